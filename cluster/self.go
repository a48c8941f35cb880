package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// A Problem is something that a node knows to be wrong, and what to do about it.
type Problem struct {
	What   string `json:"what"`
	Remedy string `json:"remedy,omitempty"`
}

// NodeStatus is a node as it sees itself, in JSON at GET /status.
type NodeStatus struct {
	CID       config.CID `json:"cid"`
	ClusterID string     `json:"cluster_id,omitempty"`
	UUID      string     `json:"uuid,omitempty"`
	Name      string     `json:"name"`
	// FQDN is the host's own name, as far as it is known without asking the DNS.
	FQDN    string `json:"fqdn,omitempty"`
	Address string `json:"address"` // host:port of its tunnel
	Version string `json:"version"`
	Role    Role   `json:"role"`
	// State is the node's own view: in sync, behind, drifted, stale, joining. Beside other nodes a Report says more.
	State    Relation        `json:"state"`
	Position config.Position `json:"position"`
	Promised config.Epoch    `json:"promised"`
	// PushedAt is when a push was last applied or confirmed here; zero on the master.
	PushedAt time.Time `json:"pushed_at,omitzero"`
	// Journal is how many commits were set aside here.
	Journal int `json:"journal"`
	// Draining is set while the node takes no mail by an operator's wish.
	Draining *Draining `json:"draining,omitempty"`
	// Kept counts queued items that were refused, while their sender may not be told, and that wait for an operator until their life is over.
	Kept int `json:"kept,omitempty"`
	// Database says whether PostgreSQL answers; if not, Position is the last known.
	Database bool `json:"database"`
	// Starting says that the daemon is making its database ready for the first time since it started, and that none of that has failed.
	Starting bool `json:"starting,omitempty"`
	// UptimeSeconds, Load1, MemoryPercent and DiskPercent are the host's; negative: unknown. Disk is that of the state directory.
	UptimeSeconds int64    `json:"uptime_seconds"`
	Load1         float64  `json:"load1"`
	MemoryPercent float64  `json:"memory_percent"`
	DiskPercent   float64  `json:"disk_percent"`
	Services      []string `json:"services"`
	// Listeners are the node's own, as config.Local.Listeners gives them.
	Listeners map[string][]string `json:"listeners,omitempty"`
	StartedAt time.Time           `json:"started_at"` // of the daemon
	Time      time.Time           `json:"time"`       // of the answer, UTC
	Zone      string              `json:"zone"`       // the host's time zone, "CET +0100"
	// RebootRequired says that the host's packages want one (/run/reboot-required).
	RebootRequired bool `json:"reboot_required"`
	// Certificate is the node's own in the cluster; nil on a single node.
	Certificate *tunnel.Certificate `json:"certificate,omitempty"`
	// TunnelOff says that this node's own tunnel is off for want of its key or identity: nobody is in reach from here.
	TunnelOff bool      `json:"tunnel_off,omitempty"`
	Peers     []Peer    `json:"peers,omitempty"`
	Problems  []Problem `json:"problems,omitempty"`
}

// Draining says since when a node takes no new mail, by whose wish, and how many sessions are left.
type Draining struct {
	Since    time.Time `json:"since"`
	By       string    `json:"by"`
	Sessions int       `json:"sessions"`
}

// A Peer is another member as a node sees it.
type Peer struct {
	CID     config.CID `json:"cid"`
	Name    string     `json:"name"`
	Address string     `json:"address"`
	// Tunnel says whether the tunnel to it is up, since Since.
	Tunnel bool      `json:"tunnel"`
	Since  time.Time `json:"since,omitzero"`
	// Transport is what carries the tunnel: ssh (plain TCP) or wireguard; empty while it is down.
	Transport config.TunnelKind `json:"transport,omitempty"`
	// Fallback is why that is not what the setting wants.
	Fallback string `json:"fallback,omitempty"`
	// LastSeen is when it last answered, over the tunnel or from its database.
	LastSeen time.Time `json:"last_seen,omitzero"`
	// Position and Promised are its last known.
	Position config.Position `json:"position"`
	Promised config.Epoch    `json:"promised"`
	// Error is why it does not answer.
	Error string `json:"error,omitempty"`
	// NotLetIn says that it, which has proven its key, does not take this node for a member.
	NotLetIn bool `json:"not_let_in,omitempty"`
	// NotTrusted says that what answers at its address is not taken for it.
	NotTrusted bool `json:"not_trusted,omitempty"`
	// ClockMS is how far its clock is ahead of this node's, in milliseconds, as last measured; nil: never.
	ClockMS *int64 `json:"clock_difference_ms,omitempty"`
	// ClockWithinMS is how far ClockMS may be off.
	ClockWithinMS int64 `json:"clock_within_ms,omitempty"`
}

// selfTimeout bounds what Self asks of the database: it answers within a second all the same.
const selfTimeout = 600 * time.Millisecond

// recently is how old a state may be that stands in for one that takes long to read: the role loop reads it every other second.
const recently = 5 * time.Second

// Self gives this node as it sees itself. It answers within a second with PostgreSQL down too, from what was last known, and says
// so. With verify the digest is recomputed from the rows first, which takes as long as the rows need, or until ctx ends.
func (n *Node) Self(ctx context.Context, verify bool) NodeStatus {
	if verify {
		if err := n.verify(ctx, n.o.DB.Verify); err != nil {
			n.warn(ctx, "drift.check", 0, err)
		}
	}
	st, err := n.stateSoon(ctx)
	host := readHost(n.o.Local.StateDir)
	now := n.o.Now()
	s := NodeStatus{
		Name: n.o.Local.Name, Address: n.o.Local.TunnelAddress(), Version: n.o.Version, Services: n.o.Local.Services, Listeners: n.o.Local.Listeners(),
		Database: err == nil, UptimeSeconds: int64(host.uptime.Seconds()), Load1: host.load1, MemoryPercent: host.memory, DiskPercent: host.disk,
		StartedAt: n.started.UTC(), Time: now.UTC(), Zone: zoneText(now),
		FQDN: fqdn(), RebootRequired: rebootRequired(),
	}
	if st.CID == 0 && err != nil {
		st = n.lastKnown(st)
	}
	s.CID, s.ClusterID, s.Position, s.Promised, s.PushedAt, s.Journal = st.CID, st.ClusterID, st.Position, st.Promised, st.PushedAt, st.JournalLen
	s.Role = roleOf(st)
	s.Starting = n.o.Starting != nil && n.o.Starting()
	if me, ok := memberOf(n.members(), st.CID); ok {
		s.UUID, s.Name, s.Address = me.UUID, me.Name, me.Address
	}
	if n.o.Draining != nil {
		s.Draining = n.o.Draining()
	}
	if n.o.Kept != nil {
		s.Kept = n.o.Kept()
	}
	s.Certificate = n.o.Tunnel.Certificate()
	s.Peers, s.TunnelOff = n.peerStatus(), n.o.Tunnel.Off()
	s.State = n.ownRelation(st, err)
	s.Problems = append(shutOut(s.Peers), n.problems(st, err)...)
	s.Problems = append(s.Problems, n.ghosts()...)
	if deleted(s.Peers) {
		s.State = Stale
	} else { // all that has one cause in a deleted node, and one remedy
		s.Problems = append(s.Problems, n.clusterProblems(st)...)
		s.Problems = append(s.Problems, n.certificateProblem()...)
		s.Problems = append(s.Problems, n.restored(ctx, st)...)
		s.Problems = append(s.Problems, cutOff(s.Peers)...)
	}
	s.Problems = append(s.Problems, strangers(s.Peers)...)
	s.Problems = append(s.Problems, fallbacks(s.Peers)...)
	s.Problems = append(s.Problems, clockProblems(s.Peers)...)
	return s
}

// Master is the node that this one takes orders from: the owner of the highest epoch that it has promised, which the gate lets push
// too. 0 on a single node. It answers with PostgreSQL down, from what was last known.
func (n *Node) Master() config.CID {
	n.mu.Lock()
	st, read := n.state, !n.stateAt.IsZero()
	n.mu.Unlock()
	if !read {
		st = n.lastKnown(st)
	}
	if st.CID == 0 {
		return 0
	}
	return st.Promised.Owner
}

// stateSoon reads the own state without waiting long. Where the database is slow and not away, what was read a moment ago is good
// enough.
func (n *Node) stateSoon(ctx context.Context) (db.State, error) {
	ctx, cancel := context.WithTimeout(ctx, selfTimeout)
	defer cancel()
	st, err := n.o.DB.State(ctx)
	slow := err != nil && ctx.Err() != nil
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case err == nil:
		n.keepLocked(st)
		return st, nil
	case slow && n.stateErr == nil && n.o.Now().Sub(n.stateAt) < recently:
		return n.state, nil
	}
	return n.state, err
}

// zoneText is "CET +0100".
func zoneText(t time.Time) string { return t.Format("MST -0700") }

// lastKnown stands in for the state where PostgreSQL has not answered since the daemon started: the identity says who we are, and
// the snapshot how far.
func (n *Node) lastKnown(st db.State) db.State {
	id, err := tunnel.LoadIdentity(n.o.Local.KeyDir())
	if err != nil {
		return st
	}
	st.CID, st.ClusterID = id.CID, id.ClusterID
	if s := n.o.Snapshot(); s != nil && s.ClusterID == id.ClusterID {
		st.Position, st.Promised = s.Position, s.Position.Epoch
	}
	return st
}

// peerStatus puts together what the tunnel and the probers know.
func (n *Node) peerStatus() []Peer {
	tunnels := map[config.CID]tunnel.PeerState{}
	for _, t := range n.o.Tunnel.Peers() {
		tunnels[t.CID] = t
	}
	peers := n.peers()
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []Peer
	for _, m := range peers {
		p := Peer{CID: m.CID, Name: m.Name, Address: m.Address}
		if t, ok := tunnels[m.CID]; ok {
			p.Tunnel, p.Since, p.LastSeen, p.Error = t.Connected, t.Since.UTC(), t.LastSeen.UTC(), t.Err
			p.NotLetIn, p.NotTrusted, p.Transport, p.Fallback = t.NotLetIn, t.NotTrusted, t.Transport, t.Fallback
			p.ClockMS, p.ClockWithinMS = clockMS(t.Clock)
		}
		if v := n.views[m.CID]; v != nil {
			p.Position, p.Promised = v.state.Position, v.state.Promised
			if v.seenAt.After(p.LastSeen) {
				p.LastSeen = v.seenAt.UTC()
			}
			if v.err != nil && p.Error == "" {
				p.Error = v.err.Error()
			}
		}
		out = append(out, p)
	}
	return out
}

// ownRelation compares the own position with the newest that any peer was seen at.
func (n *Node) ownRelation(st db.State, stateErr error) Relation {
	n.mu.Lock()
	defer n.mu.Unlock()
	newest := st.Position
	for _, v := range n.views {
		if v.answered && v.state.Position.Compare(newest) > 0 {
			newest = v.state.Position
		}
	}
	switch {
	case st.CID != 0 && joining(st):
		return Joining
	case stateErr != nil:
		return Stale
	case n.drift != nil:
		return Drifted
	case st.CID == 0:
		return InSync
	}
	return relate(newest, st.Position)
}

// problems names what is wrong here, with the remedies.
func (n *Node) problems(st db.State, stateErr error) []Problem {
	var out []Problem
	if stateErr != nil {
		what := "PostgreSQL does not answer"
		if at := n.lastRead(); at.IsZero() {
			what += "; the position shown is from the last snapshot"
		} else {
			what += "; the position shown was read " + ago(n.o.Now().Sub(at))
		}
		out = append(out, Problem{what, "mail goes on from the last snapshot; see the daemon's log, `systemctl restart mailproxy` starts a private PostgreSQL again"})
	}
	n.mu.Lock()
	d := n.drift
	n.mu.Unlock()
	if d != nil {
		out = append(out, Problem{
			fmt.Sprintf("rows were changed behind the cluster's back: digest %v, %v has %v (found %s)", d.rows, d.at, d.at.Digest, ago(n.o.Now().Sub(d.found))),
			driftRemedy(roleOf(st)),
		})
	}
	if st.JournalLen > 0 {
		out = append(out, Problem{aside(st.JournalLen) + " here", "`pmgcm journal list` and `pmgcm journal show N` here; `pmgcm journal apply N` or `pmgcm journal drop N --reason TEXT` for each"})
	}
	if _, err := os.Stat(filepath.Join(n.o.Local.StateDir, leaveFile)); err == nil && n.o.Local.StateDir != "" {
		out = append(out, Problem{"a leave was begun here and is not finished", "`pmgcm leave` here again"})
	}
	out = append(out, n.otherName(st)...)
	out = append(out, n.tunnelProblem(st)...)
	if n.o.Problems != nil {
		out = append(out, n.o.Problems()...)
	}
	return out
}

// clusterProblems names what is wrong between this node and the others.
func (n *Node) clusterProblems(st db.State) []Problem {
	var out []Problem
	if deposed(st) {
		out = append(out, Problem{
			fmt.Sprintf("no configuration is taken here: epoch %v was promised and has not begun", st.Promised),
			"with a majority in reach this node begins a new epoch by itself; without, `pmgcm promote --force` on the node that shall be master",
		})
	}
	back := n.rolledBack(st)
	if len(back) == 0 { // else that is why there is no lease, and has another remedy
		out = append(out, n.leaseProblem(st)...)
	}
	return append(append(out, back...), n.refusedPushes(st)...)
}

// otherName says that the cluster knows this node by another name or address than its own file.
func (n *Node) otherName(st db.State) []Problem {
	me, ok := memberOf(n.members(), st.CID)
	if !ok || st.CID == 0 {
		return nil
	}
	var out []Problem
	for _, c := range []struct{ what, here, there, command string }{
		{"name", n.o.Local.Name, me.Name, "rename"}, {"address", n.o.Local.Address, hostOf(me.Address), "set-address"},
	} {
		if c.here != c.there {
			out = append(out, Problem{
				fmt.Sprintf("this daemon has the %s %s from its node file, the cluster knows it by %s", c.what, c.here, c.there),
				fmt.Sprintf("`pmgcm %s %s` here writes it to the file, `systemctl restart mailproxy` reads that", c.command, c.there),
			})
		}
	}
	return out
}

// notLetInBy names the peers that do not take this node for a member. Each has proven the key that this node knew it by; still, nothing is
// done for their word but to show it: only an operator's leave, and the refusal of a promote, act on it.
func notLetInBy(peers []Peer) []string {
	var by []string
	for _, p := range peers {
		if p.NotLetIn {
			by = append(by, fmt.Sprintf("%s(%d)", p.Name, p.CID))
		}
	}
	return by
}

// deleted says whether some peer does not let this node in and none does: it was deleted. Who was deleted is not told so.
func deleted(peers []Peer) bool {
	return len(notLetInBy(peers)) > 0 && !slices.ContainsFunc(peers, func(p Peer) bool { return p.Tunnel })
}

// byLeave is how a node that was deleted becomes a member again.
const byLeave = "`pmgcm leave` here, which keeps configuration, journal and mail and makes it a single node; then, to enter again, what `pmgcm join-cmd` on the master prints"

// shutOut names the peers that do not let this node in.
func shutOut(peers []Peer) []Problem {
	by := notLetInBy(peers)
	switch {
	case len(by) == 0:
		return nil
	case deleted(peers):
		return []Problem{{"this node was deleted from the cluster, or its key is another now: it is not let in by " + strings.Join(by, ", "), byLeave}}
	}
	return []Problem{{
		"this node is not let in by " + strings.Join(by, ", "),
		"if `pmgcm status` on the master does not show this node, it was deleted: " + byLeave,
	}}
}

// strangers names the peers at whose address something else answers. It may be that nobody whom this node knows is a member any more.
func strangers(peers []Peer) []Problem {
	var at []string
	for _, p := range peers {
		if p.NotTrusted {
			at = append(at, fmt.Sprintf("%s(%d) at %s", p.Name, p.CID, p.Address))
		}
	}
	if len(at) == 0 {
		return nil
	}
	return []Problem{{
		"what answers is not trusted to be " + strings.Join(at, ", "),
		"see that the address is still that node's; if the cluster has gone on there with other nodes and without this one: " + byLeave,
	}}
}

// enterAnew is what makes a node whose key is lost one that was never in a cluster, and a member again.
func (n *Node) enterAnew() string {
	rows := "`pg` and `pg.made`"
	if n.o.Local.Database.DSN != "" {
		rows = "the database's contents"
	}
	return fmt.Sprintf("stop the daemon, remove `keys` in %s and %s, start it, and run what `pmgcm join-cmd` on the master prints", n.o.Local.StateDir, rows)
}

// tunnelProblem says what of the files in the key directory cannot be used, and what comes of it.
func (n *Node) tunnelProblem(st db.State) []Problem {
	err := n.o.Tunnel.Trouble()
	if err == nil {
		return nil
	}
	dir := n.o.Local.KeyDir()
	p := Problem{What: fmt.Sprintf("in %s: %v", dir, err)}
	if n.o.Tunnel.Off() {
		p.What = "the tunnel is off, no other node is in reach from here and mail goes on; " + p.What
	}
	switch {
	case errors.Is(err, tunnel.ErrKeyMode):
		p.Remedy = fmt.Sprintf("`chmod 600 %s/node.key`, then `systemctl restart mailproxy`", dir)
	case st.CID == 0:
		p.Remedy = fmt.Sprintf("put the file back; or, since this node is in no cluster, move %s away; then `systemctl restart mailproxy`", dir)
	default:
		p.Remedy = fmt.Sprintf("put the file back from a backup and `systemctl restart mailproxy`; or, to enter again as a new node: "+
			"`pmgcm delete %d` on the master, then here %s", st.CID, n.enterAnew())
	}
	return []Problem{p}
}

// fallbacks names the peers that are reached, and not by what the setting wants.
func fallbacks(peers []Peer) []Problem {
	var out []Problem
	for _, p := range peers {
		switch {
		case p.Fallback == "":
		case p.Transport == config.TunnelSSH:
			out = append(out, Problem{
				fmt.Sprintf("the tunnel to %s(%d) is SSH without WireGuard around it: %s", p.Name, p.CID, p.Fallback),
				fmt.Sprintf("let UDP through to port %s of the other, in both directions; or `mailproxy setting set tunnel ssh` on the master",
					portOf(p.Address)),
			})
		default:
			out = append(out, Problem{
				fmt.Sprintf("the tunnel to %s(%d) is still WireGuard: %s", p.Name, p.CID, p.Fallback),
				fmt.Sprintf("let TCP through to port %s of the other; or `mailproxy setting set tunnel wireguard` on the master", portOf(p.Address)),
			})
		}
	}
	return out
}

// aside says how many commits were set aside.
func aside(n int) string {
	if n == 1 {
		return "1 commit that the master does not have was set aside"
	}
	return fmt.Sprintf("%d commits that the master does not have were set aside", n)
}

func driftRemedy(r Role) string {
	if r == Slave {
		return "`pmgcm sync --pull` on this node takes the master's rows again, and keeps its own in the journal"
	}
	return "if the rows are as they shall be: `pmgcm sync` here gives them to every slave; if not, put them right first"
}

// cutOff says that no other node answers, of two and more: it is this node that is cut off, most likely.
func cutOff(peers []Peer) []Problem {
	var last time.Time
	for _, p := range peers {
		if p.Error == "" || p.NotLetIn || p.NotTrusted {
			return nil
		}
		if p.LastSeen.After(last) {
			last = p.LastSeen
		}
	}
	if len(peers) < 2 {
		return nil
	}
	since := "since the daemon started"
	if !last.IsZero() {
		since = "since " + last.Format(time.DateTime) + " UTC"
	}
	return []Problem{{
		fmt.Sprintf("no other node answers here, %s: what is shown of them is what was last known", since),
		"see to this host's network first: the others' tunnel ports must be reached from here, or ours from there",
	}}
}

// refusedPushes names slaves that are in reach and yet do not take the configuration.
func (n *Node) refusedPushes(st db.State) []Problem {
	if roleOf(st) != Master {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []Problem
	for _, cid := range slices.Sorted(maps.Keys(n.pushErrs)) {
		if v := n.views[cid]; v == nil || v.err != nil {
			continue // out of reach is said by its row
		}
		err := n.pushErrs[cid]
		p := Problem{fmt.Sprintf("node %d does not take the configuration: %v", cid, err), fmt.Sprintf("see the daemon's log on node %d", cid)}
		switch {
		case errors.Is(err, db.ErrOtherCluster):
			p.Remedy = fmt.Sprintf("if its database was made anew: `pmgcm join-cmd` here, then the line that it prints on node %d", cid)
		case errors.Is(err, db.ErrNewer):
			p.Remedy = fmt.Sprintf("upgrade mailproxy on node %d; it keeps the configuration that it has, and mail goes on", cid)
		case errors.Is(err, errPromisedElsewhere), errors.Is(err, db.ErrStale):
			p.Remedy = "a promote is under way or was not finished; with a majority in reach this node begins a new epoch by itself"
		}
		out = append(out, p)
	}
	return out
}

func (n *Node) lastRead() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stateAt
}

// portOf is an address's port.
func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// hostOf is an address without its port.
func hostOf(address string) string {
	if h, _, err := net.SplitHostPort(address); err == nil {
		return h
	}
	return address
}
