package lab

import (
	"encoding/json"
	"fmt"
	"strings"

	"mailproxy/config"
)

// A Report is what `pmgcm status --json` says.
type Report struct {
	InSync bool         `json:"in_sync"`
	Nodes  []NodeReport `json:"nodes"`
}

// A NodeReport is one node in it.
type NodeReport struct {
	CID      int             `json:"cid"`
	Name     string          `json:"name"`
	Role     string          `json:"role"`
	State    string          `json:"state"`
	Error    string          `json:"error"`
	Database bool            `json:"database"`
	Position config.Position `json:"position"`
	Promised config.Epoch    `json:"promised"`
	Journal  int             `json:"journal"`
	Problems []struct{ What, Remedy string }
	Peers    []struct {
		CID    int
		Tunnel bool
	}
}

// Report asks the node for the cluster's state. Its exit code is not looked at: InSync says it.
func (h *Host) Report() (Report, error) {
	var r Report
	out, errs, _, err := h.Run("pmgcm", "status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	if err != nil {
		return r, fmt.Errorf("%s: pmgcm status --json: %w\n%s%s", h.ID, err, out, errs)
	}
	return r, nil
}

// InSync gives nil when `pmgcm status` on the host says so.
func (h *Host) InSync() error {
	out, errs, code, err := h.Run("pmgcm", "status")
	if err == nil && code != 0 {
		err = fmt.Errorf("pmgcm status on %s: exit code %d\n%s%s", h.ID, code, out, errs)
	}
	return err
}

// JoinArgs asks the master for the line for a new node, and gives what stands behind pmgcm there.
func (h *Host) JoinArgs() ([]string, error) {
	out, err := h.Must("pmgcm", "join-cmd")
	if err != nil {
		return nil, err
	}
	return strings.Fields(out)[1:], nil
}

// Form starts hosts, makes the first one master of a new cluster and lets the others join, one after the other.
func Form(hosts ...*Host) error {
	for _, h := range hosts {
		if err := h.Launch(); err != nil {
			return err
		}
	}
	for _, h := range hosts {
		if err := Poll(h.Healthy); err != nil {
			return err
		}
	}
	if _, err := hosts[0].Must("pmgcm", "create"); err != nil {
		return err
	}
	for _, h := range hosts[1:] {
		args, err := hosts[0].JoinArgs()
		if err != nil {
			return err
		}
		if _, err := h.Must("pmgcm", args...); err != nil {
			return err
		}
	}
	return Poll(hosts[0].InSync)
}
