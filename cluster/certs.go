package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// renewLeft is what is left of a certificate's life when it is renewed: a third. With lastLeft left it is renewed whatever others know.
const (
	renewLeft = certValidity / 3
	lastLeft  = certValidity / 10
)

// renewCertificate keeps this node's certificates good: when two thirds of their life are over, or the master has another CA than the one
// that signed them and all nodes know it, they are signed again: by the master, for itself and for whoever asks it over the tunnel. A
// node that cannot reach it has years to try again, and mail does not ask for certificates of the cluster at all.
func (n *Node) renewCertificate(ctx context.Context) error {
	for ctx.Err() == nil {
		if n.renewalDue() {
			err := n.renew(ctx)
			if ctx.Err() != nil {
				break
			}
			n.mu.Lock()
			n.renewErr = err
			n.mu.Unlock()
			if err != nil {
				n.warn(ctx, "certificate.refused", 0, err)
			}
		}
		n.pause(ctx, n.o.Timing.Renew)
	}
	return ctx.Err()
}

// renewalDue is cheap.
func (n *Node) renewalDue() bool {
	own, s := n.o.Tunnel.Certificate(), n.o.Snapshot()
	if own == nil || s == nil {
		return false
	}
	ca, ok := signer(s.CAs, n.Master())
	return renewal(own.Expires.Sub(n.o.Now()), ok && ca.Fingerprint != own.CA, n.allInSync())
}

// renewal decides by what is left of the life, whether the next certificate is another CA's, and whether every member knows that one.
// A certificate that is old is no reason to show one of a CA that a member does not know, as long as there are years.
func renewal(left time.Duration, otherCA, allKnow bool) bool {
	if otherCA {
		return allKnow || left < lastLeft
	}
	return left < renewLeft
}

// allInSync says whether every other member is in reach and where this node is. Only then do all of them trust a new CA: one that was
// away when it was added would let in nobody who shows it, the master who must push it to that member least of all.
func (n *Node) allInSync() bool {
	peers := n.peers()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range peers {
		if v := n.views[p.CID]; v == nil || !v.answered || v.err != nil || v.state.Position != n.state.Position {
			return false
		}
	}
	return true
}

// signer is the CA that a master signs with: the newest that it made.
func signer(cas []config.CA, master config.CID) (config.CA, bool) {
	var newest config.CA
	for _, ca := range cas {
		if ca.CID == master && (newest.Fingerprint == "" || ca.CreatedAt.After(newest.CreatedAt)) {
			newest = ca
		}
	}
	return newest, newest.Fingerprint != ""
}

func (n *Node) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*askTimeout)
	defer cancel()
	dir := n.o.Local.KeyDir()
	id, err := tunnel.LoadIdentity(dir)
	if err != nil {
		return err
	}
	before := id.Certs
	if n.Master() == id.CID {
		id.Certs, err = n.sign(id.CID)
	} else {
		id.Certs, err = n.askForCertificate(ctx, n.Master())
	}
	if err != nil || id.Certs == before {
		return err
	}
	made, err := id.Certs.Describe()
	if err != nil {
		return err
	}
	if was, err := before.Describe(); err == nil && was.CA == made.CA && made.Expires.Sub(was.Expires) < time.Hour {
		return nil // the master has put its new CA in force for signing not yet
	}
	id.Nodes, id.CAs, id.Revoked = nil, nil, nil // what is on disk stays
	if err := tunnel.SaveIdentity(dir, id); err != nil {
		return err
	}
	n.o.Tunnel.Reload(n.o.Snapshot())
	n.o.Log.Info().Time("expires", made.Expires).Str("ca", made.CA).Msg("certificate.renewed")
	return nil
}

// sign signs for a member, by the key that the member list has for it, with this node's CA, which the members must trust already. It asks
// no database.
func (n *Node) sign(cid config.CID) (tunnel.Certs, error) {
	s := n.o.Snapshot()
	if s == nil {
		return tunnel.Certs{}, ErrNoCluster
	}
	node, ok := memberOf(s.Nodes, cid)
	if !ok {
		return tunnel.Certs{}, fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
	}
	ca, err := tunnel.LoadCA(n.o.Local.KeyDir())
	if err != nil {
		return tunnel.Certs{}, fmt.Errorf("read the CA's key: %w", err)
	}
	own := ca.Config(n.self())
	for _, trusted := range s.CAs {
		if trusted.Fingerprint == own.Fingerprint {
			return ca.Sign(node.PublicKey, cid, s.ClusterID, certValidity)
		}
	}
	return tunnel.Certs{}, fmt.Errorf("the cluster does not trust this node's CA %s", own.Fingerprint)
}

// serveCertificate signs for the member that asks.
func (n *Node) serveCertificate(_ context.Context, from config.CID, _ *http.Request) (any, error) {
	if st := n.known(); !st.IsMaster() {
		return nil, n.notMaster(st)
	}
	certs, err := n.sign(from)
	if err == nil {
		n.o.Log.Info().Int("node", int(from)).Msg("certificate.signed")
	}
	return certs, err
}

// askForCertificate asks the master. What comes is checked when it is saved.
func (n *Node) askForCertificate(ctx context.Context, master config.CID) (tunnel.Certs, error) {
	var certs tunnel.Certs
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return n.o.Tunnel.Dial(ctx, master, tunnel.ServiceControl)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://node/member/certificate", http.NoBody)
	if err != nil {
		return certs, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return certs, err
	}
	defer func() { _ = resp.Body.Close() }()
	body := json.NewDecoder(io.LimitReader(resp.Body, maxStatusBytes))
	if resp.StatusCode != http.StatusOK {
		var r refusal
		if body.Decode(&r) != nil || r.Error == "" {
			r.Error = resp.Status
		}
		return certs, fmt.Errorf("node %d: %w", master, r.sentinel())
	}
	return certs, body.Decode(&certs)
}

// certificateProblem says that a certificate is due and could not be renewed.
func (n *Node) certificateProblem() []Problem {
	n.mu.Lock()
	err := n.renewErr
	n.mu.Unlock()
	own := n.o.Tunnel.Certificate()
	if err == nil || own == nil {
		return nil
	}
	return []Problem{{
		fmt.Sprintf("this node's certificate, which ends on %s UTC, could not be renewed: %v", own.Expires.Format(time.DateOnly), err),
		"it is tried again every few seconds: let the master be in reach; `pmgcm ca show` shows all certificates",
	}}
}

// CAs are the cluster's CAs, oldest first, and its nodes with the certificates that they say they have.
type CAs struct {
	CAs []TrustedCA `json:"cas"`
	// Nodes are all members; Certificate is nil for one that does not answer.
	Nodes []CertifiedNode `json:"nodes"`
}

// A TrustedCA is a CA that all nodes trust. It does not expire: it is retired.
type TrustedCA struct {
	config.CA
	// Signs says that it is the one that the master signs with.
	Signs bool `json:"signs"`
}

// A CertifiedNode is a node with its certificate.
type CertifiedNode struct {
	CID         config.CID          `json:"cid"`
	Name        string              `json:"name"`
	Certificate *tunnel.Certificate `json:"certificate"`
}

// CAs asks all nodes for their certificates.
func (o *Operator) CAs(ctx context.Context) (CAs, error) {
	var all CAs
	r, err := o.Status(ctx, StatusParams{})
	if err != nil {
		return all, err
	}
	st, err := o.clusterState(ctx)
	if err != nil {
		return all, err
	}
	s, err := o.DB.Load(ctx)
	if err != nil {
		return all, err
	}
	signs, _ := signer(s.CAs, st.Promised.Owner)
	for _, ca := range s.CAs {
		all.CAs = append(all.CAs, TrustedCA{ca, ca.Fingerprint == signs.Fingerprint})
	}
	for _, row := range r.Rows {
		all.Nodes = append(all.Nodes, CertifiedNode{row.CID, row.Name, row.Certificate})
	}
	return all, nil
}

// AddCA gives the master another CA. It signs nothing before every member in reach trusts it; then the nodes renew their certificates
// by themselves. Killed anywhere it goes on with the same one.
func (o *Operator) AddCA(ctx context.Context) (config.CA, []config.Node, error) {
	var row config.CA
	st, err := o.masterState(ctx)
	if err != nil {
		return row, nil, err
	}
	if err := o.needDaemon(ctx); err != nil {
		return row, nil, err
	}
	next, err := tunnel.LoadOrMakeNextCA(o.Local.KeyDir())
	if err != nil {
		return row, nil, fmt.Errorf("make cluster CA: %w", err)
	}
	row = next.Config(st.CID)
	row.CreatedAt = time.Now().UTC().Truncate(time.Microsecond) // the newest, also beside one of the same second
	var s *config.Snapshot
	pos, err := o.DB.Commit(ctx, o.Author, func(ctx context.Context, tx *db.Tx) error {
		var err error
		if s, err = tx.Snapshot(ctx); err != nil {
			return err
		}
		return putOwnCA(ctx, tx, s, row)
	}, nil)
	if err != nil {
		return row, nil, fmt.Errorf("write the CA: %w", err)
	}
	missing, enough := o.waitHeld(ctx, s.Nodes, pos, 0)
	if !enough {
		return row, missing, fmt.Errorf("%w: less than a majority trusts the new CA yet; the old one signs on", ErrNotInSync)
	}
	return row, missing, tunnel.PromoteCA(o.Local.KeyDir())
}

// RetireCA ends the trust in a CA, on the master. ErrCAInUse where it signs, or where a node may still have a certificate of it; force
// lets such nodes go out of reach.
func (o *Operator) RetireCA(ctx context.Context, fingerprint string, f Force) error {
	if _, err := o.masterState(ctx); err != nil {
		return err
	}
	all, err := o.CAs(ctx)
	if err != nil {
		return err
	}
	known := false
	for _, ca := range all.CAs {
		if ca.Fingerprint != fingerprint {
			continue
		}
		if known = true; ca.Signs {
			return fmt.Errorf("%w: it signs", ErrCAInUse)
		}
	}
	if !known {
		return fmt.Errorf("%w: %s", ErrNoSuchCA, clean(fingerprint))
	}
	var users []config.Node
	for _, n := range all.Nodes {
		if n.Certificate == nil || n.Certificate.CA == fingerprint {
			users = append(users, config.Node{CID: n.CID, Name: n.Name})
		}
	}
	if len(users) > 0 && f != Forced {
		return fmt.Errorf("%w: %s has a certificate of it, or does not answer", ErrCAInUse, labels(users))
	}
	_, err = o.DB.Commit(ctx, o.Author, func(ctx context.Context, tx *db.Tx) error { return tx.DeleteCA(ctx, fingerprint) }, nil)
	return err
}

// Force says whether a command goes on where it warns.
type Force string

// The two.
const (
	Careful Force = "careful"
	Forced  Force = "forced"
)
