package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/tunnel"
)

// A Report is the cluster as its nodes see themselves, asked side by side.
type Report struct {
	ClusterID string    `json:"cluster_id"`
	At        time.Time `json:"at"`
	// Asked is the node that asked.
	Asked config.CID `json:"asked"`
	// InSync says whether every node answered and holds the master's configuration.
	InSync bool  `json:"in_sync"`
	Rows   []Row `json:"nodes"` // by CID
}

// A Row is one node of a Report.
type Row struct {
	NodeStatus
	// State says what the node is beside the master; it stands in for the node's own view.
	State Relation `json:"state"`
	// Error is why the node did not answer; what it last was is then known from others, if at all.
	Error string `json:"error,omitempty"`
	// Transport is what carries the asking node's tunnel to it: ssh (plain TCP) or wireguard; empty for itself and while it is down.
	Transport config.TunnelKind `json:"transport,omitempty"`
	// Since is when it last answered to the asking node; zero: not since that started, or it answers.
	Since time.Time `json:"since,omitzero"`
	// CommitsBehind is how many commits it lacks.
	CommitsBehind int64 `json:"commits_behind"`
	// PushAgeSeconds is how long ago the last push was, by the node's own clock; negative: none that is known.
	PushAgeSeconds int64 `json:"push_age_seconds"`
	// ClockMS is how far its clock is ahead of the asking node's, in milliseconds; nil: never measured.
	ClockMS *int64 `json:"clock_difference_ms,omitempty"`
	// VersionDiffers and ZoneDiffers say that they are not those of the asking node.
	VersionDiffers bool `json:"version_differs"`
	ZoneDiffers    bool `json:"zone_differs"`
}

// StatusParams are how Status asks.
type StatusParams struct {
	// Verify lets every node recompute the digest from its rows first, and waits up to VerifyTimeout for that.
	Verify bool
}

// verifyTimeout bounds how long a node may take to recompute its digest.
const verifyTimeout = time.Minute

// Status asks every node how it sees itself, side by side, each for 2 s at most. It works with PostgreSQL down, here and elsewhere.
// On a single node the Report is of that alone, with ErrNoCluster, and ErrUnwell where something is wrong with it. Not being in sync is no error: see Report.InSync.
func (o *Operator) Status(ctx context.Context, p StatusParams) (Report, error) {
	bound := statusTimeout
	if p.Verify {
		bound = verifyTimeout
	}
	asked, cancel := context.WithTimeout(ctx, bound)
	self, selfErr := o.fetchStatus(asked, o.Local.ControlSocket(), p.Verify)
	cancel()
	if selfErr != nil {
		var err error
		rest, cancel := context.WithTimeout(ctx, statusTimeout)
		self, err = o.withoutDaemon(rest, daemonError(selfErr))
		if cancel(); err != nil {
			return Report{}, err
		}
	}
	if self.CID == 0 {
		return alone(self)
	}
	r := Report{ClusterID: self.ClusterID, At: time.Now().UTC(), Asked: self.CID, Rows: make([]Row, len(self.Peers)+1)}
	r.Rows[0] = Row{NodeStatus: self}
	if selfErr != nil {
		r.Rows[0].Error = daemonError(selfErr).Error()
	}
	var all sync.WaitGroup
	for i, peer := range self.Peers {
		all.Go(func() { r.Rows[i+1] = o.askRow(ctx, peer, selfErr == nil, p.Verify, bound) })
	}
	all.Wait()
	slices.SortFunc(r.Rows, func(a, b Row) int { return cmp.Compare(a.CID, b.CID) })
	r.judge()
	return r, nil
}

// alone is the report of a node in no cluster.
func alone(self NodeStatus) (Report, error) {
	err := ErrNoCluster
	if len(self.Problems) > 0 {
		err = fmt.Errorf("%w: %w", err, ErrUnwell)
	}
	return Report{At: time.Now().UTC(), Rows: []Row{{NodeStatus: self, State: self.State}}}, err
}

// waitPoll is the pause between two looks at a cluster that is waited for.
const waitPoll = 250 * time.Millisecond

// WaitInSync asks until every node is in sync, at most for the given time, and gives the last report. A daemon or a database that is
// still on its way up is waited for too. The error is Status's, where that never gave a report.
func (o *Operator) WaitInSync(ctx context.Context, p StatusParams, bound time.Duration) (Report, error) {
	end := time.NewTimer(bound)
	defer end.Stop()
	var last Report
	for {
		r, err := o.Status(ctx, p)
		if errors.Is(err, ErrNoCluster) {
			return r, err
		}
		if err == nil {
			last = r
		}
		if last.InSync && err == nil {
			return last, nil
		}
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-end.C:
			if last.Rows != nil {
				err = nil
			}
			return last, err
		case <-time.After(waitPoll):
		}
	}
}

// notAsked is the error of every other row where the local daemon, which has the tunnels, is away.
const notAsked = "not asked: that takes the local daemon"

// askRow asks one peer. Where it does not answer the row says what this node last knew.
func (o *Operator) askRow(ctx context.Context, peer Peer, daemon, verify bool, bound time.Duration) Row {
	row := Row{NodeStatus: NodeStatus{CID: peer.CID, Name: peer.Name, Address: peer.Address}, Since: peer.LastSeen, Transport: peer.Transport}
	row.Position, row.Promised, row.ClockMS = peer.Position, peer.Promised, peer.ClockMS
	row.Load1, row.MemoryPercent, row.DiskPercent, row.UptimeSeconds = -1, -1, -1, -1
	if !daemon {
		row.Error = notAsked
		return row
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	s, err := o.fetchStatus(ctx, o.Local.PeerDir(peer.CID)+"/control.sock", verify)
	switch {
	case err == nil && s.CID == peer.CID:
		s.Peers = nil // each node's view of the others is not what was asked
		s.Name, s.Address = peer.Name, peer.Address
		row.NodeStatus = sanitize(s)
		row.Since = time.Time{}
	case err == nil:
		row.Error = fmt.Sprintf("answered as node %d", s.CID)
	case peer.Error != "" && !peer.Tunnel:
		row.Error = clean(peer.Error)
	default:
		row.Error = err.Error()
	}
	return row
}

// sanitize makes another node's texts fit for a terminal.
func sanitize(s NodeStatus) NodeStatus {
	s.FQDN = clean(s.FQDN)
	if s.Draining != nil {
		s.Draining = &Draining{s.Draining.Since, clean(s.Draining.By), s.Draining.Sessions}
	}
	if s.Certificate != nil {
		s.Certificate = &tunnel.Certificate{Fingerprint: clean(s.Certificate.Fingerprint), CA: clean(s.Certificate.CA), Expires: s.Certificate.Expires}
	}
	s.Version, s.UUID, s.Zone, s.ClusterID = clean(s.Version), clean(s.UUID), clean(s.Zone), clean(s.ClusterID)
	for i := range s.Services {
		s.Services[i] = clean(s.Services[i])
	}
	for _, l := range s.Listeners {
		for i := range l {
			l[i] = clean(l[i])
		}
	}
	for i, p := range s.Problems {
		s.Problems[i] = Problem{clean(p.What), clean(p.Remedy)}
	}
	return s
}

// withoutDaemon puts the own status together from what is on disk: the identity, and the members in the database or the last snapshot.
func (o *Operator) withoutDaemon(ctx context.Context, away error) (NodeStatus, error) {
	host := readHost(o.Local.StateDir)
	s := NodeStatus{
		Name: o.Local.Name, Address: o.Local.TunnelAddress(), Version: o.Version, Services: o.Local.Services, Listeners: o.Local.Listeners(), Time: time.Now().UTC(),
		UptimeSeconds: int64(host.uptime.Seconds()), Load1: host.load1, MemoryPercent: host.memory, DiskPercent: host.disk,
		Problems: []Problem{{"the daemon is not running", "systemctl start mailproxy"}},
		FQDN:     fqdn(), RebootRequired: rebootRequired(), Zone: zoneText(time.Now()),
	}
	if errors.Is(away, ErrDaemonSilent) {
		s.Problems = []Problem{{"the daemon runs and does not answer", "systemctl restart mailproxy"}}
	}
	var members []config.Node
	if st, err := o.state(ctx); err == nil {
		s.Database, s.CID, s.ClusterID, s.Position, s.Promised = true, st.CID, st.ClusterID, st.Position, st.Promised
		s.PushedAt, s.Journal, s.Role = st.PushedAt, st.JournalLen, roleOf(st)
		if snap, err := o.DB.Load(ctx); err == nil {
			members = snap.Nodes
		}
	} else {
		id, err := tunnel.LoadIdentity(o.Local.KeyDir())
		if errors.Is(err, fs.ErrNotExist) {
			return s, nil
		}
		if err != nil {
			return s, fmt.Errorf("read identity: %w", err)
		}
		s.CID, s.ClusterID, members = id.CID, id.ClusterID, id.Nodes
		if snap, err := config.LoadSnapshot(o.Local.SnapshotFile()); err == nil && snap.ClusterID == id.ClusterID {
			members, s.Position = snap.Nodes, snap.Position
		}
	}
	for _, m := range members {
		if m.CID == s.CID {
			s.Name, s.Address, s.UUID = m.Name, m.Address, m.UUID
			continue
		}
		s.Peers = append(s.Peers, Peer{CID: m.CID, Name: m.Name, Address: m.Address})
	}
	return s, nil
}

// judge says of every row what it is beside the master: the node that answered as master in the highest epoch, or, while none does,
// the newest position that anybody knows.
func (r *Report) judge() {
	var reference config.Position
	for _, row := range r.Rows {
		if row.Position.Compare(reference) > 0 {
			reference = row.Position
		}
	}
	for _, row := range r.Rows {
		if row.Error == "" && row.Role == Master && row.Position.Epoch == reference.Epoch {
			reference = row.Position
		}
	}
	asked := NodeStatus{}
	for _, row := range r.Rows {
		if row.CID == r.Asked {
			asked = row.NodeStatus
		}
	}
	r.InSync = len(r.Rows) > 0
	for i := range r.Rows {
		row := &r.Rows[i]
		row.State = row.judge(reference)
		row.compare(reference, asked)
		if row.Error != "" {
			row.Role = Slave
			if reference.Epoch.Owner == row.CID {
				row.Role = Master
			}
		}
		if row.Role == "" {
			row.Role = Slave
		}
		r.InSync = r.InSync && row.State == InSync
	}
	r.twoMasters(reference)
	r.forgotten(reference)
	r.noMaster()
}

// forgotten names the master of the epoch in force where its database was put back to before it became that: it does not know, and
// nobody else is master.
func (r *Report) forgotten(reference config.Position) {
	for i := range r.Rows {
		row := &r.Rows[i]
		if row.CID != reference.Epoch.Owner || row.Error != "" || !row.Database || row.Position.Epoch.Compare(reference.Epoch) >= 0 {
			continue
		}
		p := Problem{
			fmt.Sprintf("rolled back: it began epoch %v and its database knows of %v; configuration cannot be changed anywhere", reference.Epoch, row.Position.Epoch),
			"`pmgcm promote` on a node that is in sync",
		}
		for _, other := range r.Rows {
			if other.Error == "" && other.Position == reference {
				p.Remedy = fmt.Sprintf("`pmgcm promote` on node %d", other.CID)
				break
			}
		}
		row.Problems = append(row.Problems, p)
	}
}

// noMaster names a master that does not answer; one that does not let the asking node in is up, and that node's problem says so. One whose
// own tunnel is off, or whose daemon is away, cannot know, and one that was deleted is not to be led to promote.
func (r *Report) noMaster() {
	shut := map[config.CID]bool{}
	for _, row := range r.Rows {
		if row.CID == r.Asked && (row.TunnelOff || row.Error != "" || deleted(row.Peers)) {
			return
		}
		for _, p := range row.Peers {
			shut[p.CID] = p.NotLetIn
		}
	}
	for i := range r.Rows {
		if row := &r.Rows[i]; row.Role == Master && row.Error != "" && row.CID != r.Asked && !shut[row.CID] {
			row.Problems = append(row.Problems, Problem{
				"the master does not answer: mail goes on, configuration cannot be changed",
				"bring it back, or `pmgcm promote` on a node that is in sync",
			})
		}
	}
}

// compare fills in what a row is beside the master's position and the node that asked.
func (row *Row) compare(reference config.Position, asked NodeStatus) {
	row.PushAgeSeconds = -1
	if row.Position.Epoch.N > 0 {
		row.CommitsBehind = max(0, reference.Serial-row.Position.Serial)
	}
	if row.Error != "" {
		return
	}
	if !row.PushedAt.IsZero() && row.Role != Master {
		row.PushAgeSeconds = max(0, int64(row.Time.Sub(row.PushedAt).Seconds()))
	}
	row.VersionDiffers = row.Version != asked.Version
	row.ZoneDiffers = offsetOf(row.Zone) != offsetOf(asked.Zone)
}

// offsetOf is the "+0100" of a zone, since names differ where the time does not.
func offsetOf(zone string) string { return zone[strings.LastIndexByte(zone, ' ')+1:] }

func (row *Row) judge(reference config.Position) Relation {
	switch {
	case row.Error != "":
		return Unreachable
	case !row.Database, row.NodeStatus.State == Stale:
		return Stale
	case row.NodeStatus.State == Drifted:
		return Drifted
	case row.Role == Master && row.Position.Epoch.Compare(reference.Epoch) < 0:
		return Stale
	}
	return relate(reference, row.Position)
}

// twoMasters names a node that still thinks itself master in an epoch that is over.
func (r *Report) twoMasters(reference config.Position) {
	for i := range r.Rows {
		if row := &r.Rows[i]; row.Role == Master && row.State == Stale && row.Database && row.Position.Epoch.Compare(reference.Epoch) < 0 {
			row.Problems = append(row.Problems, Problem{
				fmt.Sprintf("still master of epoch %v, but %v is in force", row.Position.Epoch, reference.Epoch),
				"it steps down as soon as it reaches a node of the newer epoch; see its tunnels",
			})
		}
	}
}
