package db

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"mailproxy/config"
)

// PushStats say what a push did.
type PushStats struct {
	Bytes      int64           `json:"bytes"`   // sent to the peer; by Adopt: read from it
	Rows       int64           `json:"rows"`    // rows sent
	Resumed    int64           `json:"resumed"` // rows that were there already, from pushes that broke
	Tables     []string        `json:"tables"`  // tables whose digest differed, those of a full push or adoption
	Took       time.Duration   `json:"took"`
	Full       bool            `json:"full"` // by tables, not by what commits have touched
	From       config.Position `json:"from"`
	To         config.Position `json:"to"`
	Journalled int             `json:"journalled"` // commits that the receiver set aside
}

// InSync says whether there was nothing to do.
func (s PushStats) InSync() bool { return s.From == s.To }

// Progress is told how many rows of a push were sent so far, with those that were there from pushes that broke, of how many; nil: nobody is.
// A push that has to begin again tells so by less, or of another many. It is called by one goroutine at a time.
type Progress func(sent, of int64)

// Push brings a peer to this node's position: the rows that commits since the peer's position touched, or, where history does not
// lead there, the outcome differs, or much of a large table was touched, the tables whose digest differs. A peer that has not promised our epoch is asked to. ErrNotMaster here; ErrStale: the peer has promised a higher epoch; ErrAhead;
// ErrNewer; ErrOtherCluster.
func (d *DB) Push(ctx context.Context, p *Peer, progress Progress) (PushStats, error) {
	return d.pushAll(ctx, p, false, progress)
}

// PushFull is Push that sends every table whole, also to a peer in sync.
func (d *DB) PushFull(ctx context.Context, p *Peer, progress Progress) (PushStats, error) {
	return d.pushAll(ctx, p, true, progress)
}

func (d *DB) pushAll(ctx context.Context, p *Peer, whole bool, progress Progress) (PushStats, error) {
	select {
	case d.pushes <- struct{}{}:
		defer func() { <-d.pushes }()
	case <-ctx.Done():
		return PushStats{}, fmt.Errorf("push: %w", ctx.Err())
	}
	start := time.Now()
	before := p.sent.written.Load()
	stats, err := d.push(ctx, p, whole, progress)
	if errors.Is(mapError(err), ErrAhead) { // another push of ours came in between, or the peer is ahead and still is
		stats, err = d.push(ctx, p, whole, progress)
	}
	stats.Took = time.Since(start)
	stats.Bytes = p.sent.written.Load() - before
	if err != nil {
		return stats, fmt.Errorf("push: %w", mapError(err))
	}
	return stats, nil
}

func (d *DB) push(ctx context.Context, p *Peer, whole bool, progress Progress) (PushStats, error) {
	// The peer's state is read before ours: what it holds of our epoch by then, we do too.
	there, err := d.openForPush(ctx, p)
	if err != nil {
		return PushStats{}, err
	}
	stats := PushStats{From: there.Position}
	err = d.read(ctx, func(tx pgx.Tx) error {
		here, err := readState(ctx, tx)
		if err != nil {
			return err
		}
		stats.To = here.Position
		if err := mayPush(here, there); err != nil {
			return err
		}
		if err := stillMember(ctx, tx, there); err != nil {
			return err
		}
		if here.Position == there.Position && !whole {
			return p.Heartbeat(ctx, here.Position)
		}
		if err := newEnough(ctx, tx, there); err != nil {
			return err
		}
		if whole {
			for t := range there.sums {
				there.sums[t] = "" // as if every digest differed
			}
		}
		s := sending{tx: tx, peer: p, here: here, there: there, stats: &stats, progress: progress, large: d.large, part: d.part, whole: whole}
		if ok, err := s.wantsDelta(ctx); err != nil {
			return err
		} else if ok {
			if err := s.delta(ctx); !errors.Is(mapError(err), ErrDrift) {
				return err
			}
		}
		return s.full(ctx)
	})
	return stats, err
}

// openForPush makes sure that the peer lets us push, by our epoch, and gives its state.
func (d *DB) openForPush(ctx context.Context, p *Peer) (peerState, error) {
	here, err := readState(ctx, d.pool)
	if err != nil {
		return peerState{}, err
	}
	if !here.IsMaster() {
		return peerState{}, &NotMasterError{Master: here.Promised.Owner}
	}
	there, err := p.lastState(ctx)
	if err != nil {
		return peerState{}, err
	}
	if there.ClusterID != here.ClusterID {
		return peerState{}, ErrOtherCluster
	}
	switch there.Promised.Compare(here.Position.Epoch) {
	case 1:
		return peerState{}, fmt.Errorf("%w: %v", ErrStale, there.Promised)
	case -1:
		if _, err := p.Promise(ctx, here.Position.Epoch.N); err != nil {
			return peerState{}, err
		}
	}
	if there.kind != "push" || there.Promised != here.Position.Epoch { // the role that we log in as has become another
		p.Close()
		if err := p.connect(ctx); err != nil {
			return peerState{}, err
		}
		return p.state(ctx)
	}
	return there, nil
}

// mayPush compares positions.
func mayPush(here State, there peerState) error {
	switch {
	case !here.IsMaster():
		return &NotMasterError{Master: here.Promised.Owner}
	case there.Promised.Compare(here.Position.Epoch) > 0:
		return fmt.Errorf("%w: %v", ErrStale, there.Promised)
	case there.Position.Epoch == here.Position.Epoch && there.Position.Serial > here.Position.Serial:
		return fmt.Errorf("%w: %v, we are at %v", ErrAhead, there.Position, here.Position)
	}
	return nil
}

// stillMember refuses a peer that the state which would be pushed does not have as a member: a deleted node shall not hear of what came
// with its delete, and one that leaves keeps the secrets as it could open them. Its tunnel may not be cut yet.
func stillMember(ctx context.Context, tx pgx.Tx, there peerState) error {
	var member bool
	if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM config.node WHERE cid = $1)", there.CID).Scan(&member); err != nil {
		return err
	}
	if !member {
		return fmt.Errorf("%w: CID %d was deleted", ErrNotMember, there.CID)
	}
	return nil
}

// newEnough refuses a peer whose schema is older than ours, also where our rows would still fit: which of them do would change with each
// commit. One that is newer has all that we have, as schemas only grow.
func newEnough(ctx context.Context, tx pgx.Tx, there peerState) error {
	var schema int64
	if err := tx.QueryRow(ctx, "SELECT max(version_id) FROM node.migration WHERE is_applied").Scan(&schema); err != nil {
		return err
	}
	if there.schema < schema {
		return fmt.Errorf("%w: %d there, %d here", ErrNewer, there.schema, schema)
	}
	return nil
}

// sending is one push on its way: our transaction, which sees one state, and the peer.
type sending struct {
	tx       pgx.Tx
	peer     *Peer
	here     State
	there    peerState
	stats    *PushStats
	progress Progress
	of       int64             // how many rows there are to tell of
	large    int64             // tables of so many rows go by themselves
	part     time.Duration     // so long a large table is sent before the peer keeps what it has
	whole    bool              // every row goes, also where buckets of rows are equal
	sums     map[string]string // by table, our kept sums; nil: not asked for

	// The transaction at the peer:
	began time.Time // when the first row of a large table went out in it; zero: none did
	parts bool      // others came before it, and the peer keeps what they brought
}

// deltaShare is of how many rows of a large table one at most is sent by what history says; of more the table itself is looked at, which
// is sent as it lies there, and goes on where a push broke.
const deltaShare = 8

// muchTouched counts the rows that commits from one serial to another touched, of the tables of which there are so many. Bounded on both
// sides it is known to be little to read also before there are statistics, as after a commit of 100,000 rows.
const muchTouched = `SELECT coalesce(jsonb_object_agg(tab, n), '{}') FROM (SELECT tab, count(*) AS n FROM config.change
	WHERE serial > $1 AND serial <= $2 GROUP BY tab HAVING count(*) >= $3) t`

// wantsDelta says whether what commits since the peer's position touched is known, and is the least to send.
func (s *sending) wantsDelta(ctx context.Context) (bool, error) {
	if s.whole {
		return false, nil
	}
	var ok bool
	p := s.there.Position
	err := s.tx.QueryRow(ctx, "SELECT node.can_delta($1, $2, $3)", p.Epoch.N, p.Epoch.Owner, p.Serial).Scan(&ok)
	if err != nil || !ok {
		return false, err
	}
	var touched map[string]int64
	err = s.tx.QueryRow(ctx, muchTouched, p.Serial, s.here.Position.Serial, largeTable).Scan(&touched)
	if err != nil || len(touched) == 0 {
		return err == nil, err
	}
	if err := s.readSums(ctx); err != nil {
		return false, err
	}
	for t, n := range touched {
		if n*deltaShare > rowsOf(s.sums[t]) {
			return false, nil
		}
	}
	return true, nil
}

// readSums reads our kept sums, once.
func (s *sending) readSums(ctx context.Context) error {
	if s.sums != nil {
		return nil
	}
	return s.tx.QueryRow(ctx, "SELECT node.sums()").Scan(&s.sums)
}

// delta sends what commits since the peer's position touched.
func (s *sending) delta(ctx context.Context) error {
	var sql string
	if err := s.tx.QueryRow(ctx, "SELECT node.delta_sql($1)", s.there.Position.Serial).Scan(&sql); err != nil {
		return err
	}
	if done, err := s.burst(ctx, sql); done || err != nil {
		return err
	}
	return s.send(ctx, sql, []string{}, nil)
}

// full sends the tables whose digest differs.
func (s *sending) full(ctx context.Context) error {
	// What the peer undid is still what it has, but its own commits may have gone on; it is a slave, so they have not.
	if err := s.readSums(ctx); err != nil {
		return err
	}
	sums := s.sums
	tables := differing(sums, s.there.sums)
	s.stats.Full, s.stats.Tables = true, tables
	large := slices.DeleteFunc(slices.Clone(tables), func(t string) bool { return rowsOf(sums[t]) < s.large })
	small := slices.DeleteFunc(slices.Clone(tables), func(t string) bool { return slices.Contains(large, t) })
	for _, t := range large {
		s.of += rowsOf(sums[t])
	}
	var sql string
	if err := s.tx.QueryRow(ctx, "SELECT node.whole_sql($1)", small).Scan(&sql); err != nil {
		return err
	}
	err := s.send(ctx, sql, tables, large)
	if s.parts && errors.Is(mapError(err), ErrDrift) { // the next push shall not begin with that
		if _, err := s.peer.conn.Exec(ctx, "SELECT node.forget_kept($1, $2)", s.here.Position.Epoch.N, s.here.ClusterID); err != nil {
			return fmt.Errorf("forget what the peer kept: %w", err)
		}
	}
	return err
}

// differing gives the tables whose kept sums are not the same at both ends, by name.
func differing(here, there map[string]string) []string {
	tables := []string{}
	for t, sum := range here {
		if there[t] != sum {
			tables = append(tables, t)
		}
	}
	for t := range there {
		if _, ok := here[t]; !ok {
			tables = append(tables, t)
		}
	}
	slices.Sort(tables)
	return tables
}

// send copies the rows of a query and large tables to the peer, and applies all of it there, in one transaction at the peer.
func (s *sending) send(ctx context.Context, sql string, whole, large []string) error {
	err := s.begin(ctx, "")
	if err == nil {
		err = s.sendAll(ctx, sql, whole, large)
	}
	if err != nil {
		_, _ = s.peer.conn.Exec(ctx, "ROLLBACK") // the first error is told
		return err
	}
	_, err = s.peer.conn.Exec(ctx, "COMMIT")
	return err
}

// begin begins a transaction at the peer, in one round trip with what is to come before it.
func (s *sending) begin(ctx context.Context, before string) error {
	s.began = time.Time{}
	sql := fmt.Sprintf("%sBEGIN; SELECT node.begin_push(%d, %s); %s", before, s.here.Position.Epoch.N, quote(s.here.ClusterID), textSettings)
	_, err := s.peer.conn.PgConn().Exec(ctx, sql).ReadAll()
	return err
}

func (s *sending) sendAll(ctx context.Context, sql string, whole, large []string) error {
	if err := s.count(ctx, sql); err != nil {
		return err
	}
	copies, err := s.fillLarge(ctx, large)
	if err != nil {
		return err
	}
	rows := s.open(ctx, sql, nil)
	_, err = rows.copyPart(ctx, s.peer.conn.PgConn(), stagingColumns, time.Time{})
	if err := s.close(rows, err); err != nil {
		return err
	}
	for _, c := range copies {
		if err := s.endCopy(ctx, c); err != nil {
			return fmt.Errorf("table %s: %w", c.table, err)
		}
	}
	to := s.here.Position
	var touched int64
	return s.peer.conn.QueryRow(ctx, "SELECT journalled, touched FROM node.push($1, $2, $3, $4, $5)", to.Epoch.N, s.here.ClusterID, to.Serial,
		to.Digest[:], whole).Scan(&s.stats.Journalled, &touched)
}

// count adds the rows of a query to those that there are to tell of, where anybody wants to know.
func (s *sending) count(ctx context.Context, sql string) error {
	if s.progress == nil {
		return nil
	}
	var n int64
	if err := s.tx.QueryRow(ctx, "SELECT count(*) FROM ("+sql+") row_").Scan(&n); err != nil {
		return fmt.Errorf("count the rows to send: %w", err)
	}
	s.of += n
	return nil
}

// open begins to read the rows of a query, to be sent; see, unless nil, is given each.
func (s *sending) open(ctx context.Context, sql string, see func(row []byte)) *rowStream {
	counter := &rowCounter{rows: s.stats.Rows}
	if s.progress != nil {
		counter.progress = func(rows int64) { s.progress(rows+s.stats.Resumed, s.of) }
	}
	return openRows(ctx, s.tx.Conn().PgConn(), sql, counter, see)
}

// close ends what open has begun, as rowStream.close does.
func (s *sending) close(rows *rowStream, err error) error {
	err = rows.close(err)
	s.stats.Rows = rows.counter.rows
	return err
}

// stagingColumns are those of the staging table, for whole_sql and delta_sql.
const stagingColumns = "pg_temp.staging (tab, op, row)"

// copyRows sends the rows of a query on one connection into the staging table of another, and gives how much that was.
func copyRows(ctx context.Context, from, to *pgconn.PgConn, sql string) (*rowCounter, error) {
	rows := openRows(ctx, from, sql, &rowCounter{}, nil)
	_, err := rows.copyPart(ctx, to, stagingColumns, time.Time{})
	return rows.counter, rows.close(err)
}
