package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
)

// askedBy is what a node answers to a member that asks for something for itself.
func (n *testNode) askedBy(from config.CID, path, body string) (int, error) {
	w := httptest.NewRecorder()
	n.node.ServeMember(from, w, httptest.NewRequestWithContext(n.t.Context(), http.MethodPost, path, strings.NewReader(body)))
	if w.Code == http.StatusOK {
		return w.Code, nil
	}
	var r refusal
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil {
		return w.Code, err
	}
	return w.Code, r.sentinel()
}

func TestAMemberChangesItsOwnRowAlone(t *testing.T) {
	nodes := newCluster(t, 2)
	master, slave := nodes[0], nodes[1]
	before := master.state().Position
	for _, c := range []struct {
		name string
		at   *testNode
		from config.CID
		body string
		want error
	}{
		{"another's name", master, 2, `{"name":"mx1"}`, ErrNameTaken},
		{"another's address", master, 2, `{"address":"` + master.local.TunnelAddress() + `"}`, ErrAddressTaken},
		{"no name", master, 2, `{"name":"a b"}`, ErrBadRequest},
		{"a name in other letters", master, 2, `{"name":"MX7"}`, ErrBadRequest},
		{"no port", master, 2, `{"address":"192.0.2.1"}`, ErrBadRequest},
		{"a port that is none", master, 2, `{"address":"192.0.2.1:0"}`, ErrBadRequest},
		{"no address", master, 2, `{"address":"0.0.0.0:7025"}`, ErrBadRequest},
		{"no JSON", master, 2, `x`, ErrBadRequest},
		{"an author that is too long", master, 2, `{"name":"mx7","who":"` + strings.Repeat("x", maxAuthor+1) + `"}`, ErrBadRequest},
		{"who is no member", master, 9, `{"name":"mx7"}`, ErrNoSuchNode},
		{"at a slave", slave, 1, `{"name":"mx7"}`, ErrNotMaster},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := c.at.askedBy(c.from, "/member/node", c.body); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	if now := master.state().Position; now != before {
		t.Errorf("what was refused changed %v to %v", before, now)
	}
	if _, err := master.askedBy(2, "/member/node", `{"name":"mx7","cid":1,"who":"root","command":"x"}`); err != nil {
		t.Fatal(err)
	}
	s, err := master.db.Load(t.Context())
	if err != nil || s.Nodes[0].Name != "mx1" || s.Nodes[1].Name != "mx7" {
		t.Errorf("members: %+v, %v", s.Nodes, err)
	}
	if code, _ := master.askedBy(2, "/member/nonsense", ""); code != http.StatusNotFound {
		t.Errorf("a path that is none: %d", code)
	}
}

// What a member asks for fails at the master for the master's own reasons, and the asking node has the remedy for each.
func TestWhyTheMasterCannotTravels(t *testing.T) {
	for _, why := range []error{db.ErrNoLease, db.ErrDiskFull, db.ErrStale} {
		r := refusalOf(fmt.Errorf("commit: %w", why))
		if err := r.sentinel(); !errors.Is(err, why) {
			t.Errorf("%v arrives as %v", why, err)
		}
	}
	nodes := newCluster(t, 2)
	nodes[0].mustPutDomain("kept.test")
	inSync(t, nodes...)
	nodes[0].rollBack()
	eventually(t, "the master has lost its lease", func() bool { has, err := nodes[0].db.HasLease(t.Context()); return err == nil && !has })
	for name, do := range map[string]func() error{
		"leave":  func() error { return nodes[1].operator().Leave(t.Context(), nil) },
		"rename": func() error { _, err := nodes[1].operator().Rename(t.Context(), 0, "mx9"); return err },
	} {
		if err := do(); !errors.Is(err, db.ErrNoLease) || !strings.HasPrefix(err.Error(), "the master: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
