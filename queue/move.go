package queue

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/spool"
)

// A Moved is an item on its way to another node's queue, without its content. It keeps its ID, so that giving it twice is giving it once.
type Moved struct {
	ID       string          `json:"id"`
	Size     int64           `json:"size"` // of the content, in octets
	Envelope mail.Envelope   `json:"envelope"`
	State    json.RawMessage `json:"state"`
	// Order names the order, as an item's ID does an item; with its first item next hops that seem dead are tried again.
	Order string `json:"order,omitempty"`
}

// movesAtOnce is how many items are on their way to another node together.
const movesAtOnce = 16

// Move carries out an order to give items to another node, as Do does. send gives one, and returns nil once it is durable there; an error
// that wraps ErrRefused says that it is not there. On any other the item may be there, too: the log names it (move.unsure), as it does
// at the next start one that was on its way when the daemon was killed (move.cut), and the order ends, but with ErrComing. It is removed
// here only when it is durable there.
func (q *Queue) Move(ctx context.Context, o Order, send func(context.Context, *Moved, mail.Content) error, said func(id string, err error) error) error {
	r := &orderRun{Queue: q, o: o, said: said, id: mail.NewID(q.o.Now())}
	return r.run(ctx, func(ctx context.Context, claimed []*entry) error {
		errs := make([]error, len(claimed))
		parallel(len(claimed), movesAtOnce, func(i int) { errs[i] = r.move(ctx, claimed[i], send) })
		r.giveBack(claimed)
		for i, n := range claimed {
			if err := r.say(n.id, errs[i]); err != nil {
				return err
			}
		}
		if lost := r.lost.Load(); lost != nil {
			return *lost
		}
		return nil
	})
}

// move gives one claimed entry to the other node.
func (r *orderRun) move(ctx context.Context, n *entry, send func(context.Context, *Moved, mail.Content) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if lost := r.lost.Load(); lost != nil { // each more would have us wait for nothing
		return fmt.Errorf("%w: %w", ErrRefused, *lost)
	}
	m, err := r.spool.Open(n.id)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Check(); err != nil {
		return err
	}
	r.mu.Lock()
	before := n.state()
	r.mu.Unlock()
	there := before.dueAt(r.Queue.o.Now())
	state, err := there.encode()
	if err != nil {
		return err
	}
	underWay := *before
	underWay.Moving = r.o.To
	if err := r.saveState(n.id, &underWay, false); err != nil {
		r.health.note(r.Queue.o.Now(), r.log, err)
		return err
	}
	err = send(ctx, &Moved{ID: n.id, Size: n.size, Envelope: *m.Envelope, State: state, Order: r.id}, m.Content)
	if err == nil {
		return r.remove(n, "moved")
	}
	if !errors.Is(err, ErrRefused) {
		if !errors.Is(err, ErrComing) {
			r.lost.CompareAndSwap(nil, &err)
		}
		r.log.Warn().Str("item", n.id).Int("to", int(r.o.To)).AnErr("err", err).Msg("move.unsure")
		unsure := err
		if !errors.Is(err, ErrComing) { // which says so itself
			unsure = fmt.Errorf("it may be there, too: %w", err)
		}
		r.health.note(r.Queue.o.Now(), r.log, r.saveState(n.id, before, false)) // else the next start says it again
		return unsure
	}
	r.health.note(r.Queue.o.Now(), r.log, r.saveState(n.id, before, false))
	return err
}

// maxMoved bounds the content of an item that comes from another node, in octets.
const maxMoved = 4 << 30

// inMemory is how much of a content that comes is held in memory.
const inMemory = 256 << 10

// Receive takes an item from another node, whose content r gives, and returns when it is durable here. Where it is here already that is
// all. The error is ErrOther, ErrComing while the same item is on its way in, a *mail.Reply as Put's, or says what is
// wrong with the item.
func (q *Queue) Receive(from config.CID, m *Moved, r io.Reader) error {
	s, err := m.check()
	if err != nil {
		return err
	}
	q.mu.Lock()
	n := q.items[m.ID]
	_, coming := q.coming[m.ID]
	if n == nil && !coming {
		q.coming[m.ID] = struct{}{}
	}
	same := n != nil && n.size == m.Size && n.reverse == m.Envelope.ReversePath && n.session == m.Envelope.Session
	ordered := same && n.ordered
	q.mu.Unlock()
	switch {
	case coming, ordered: // what is on its way out is not here for long: it may be on its way to that very node
		return ErrComing
	case same:
		return nil
	case n != nil:
		return ErrOther
	}
	defer func() {
		q.mu.Lock()
		delete(q.coming, m.ID)
		q.mu.Unlock()
	}()
	if err := q.spool.Room(2*m.Size, q.o.MinFree); err != nil { // it is written down twice
		return refusal(err)
	}
	content, done, err := q.readContent(r, m.Size)
	if err != nil {
		return err
	}
	defer done()
	n = newEntry(m.ID, m.Size, &m.Envelope, s)
	if err := q.keep(m, content, n); err != nil {
		return refusal(err)
	}
	if q.isNewOrder(m.Order) {
		q.forgetTheDead()
	}
	q.mu.Lock()
	q.items[n.id] = n
	q.scheduleLocked(n)
	q.mu.Unlock()
	q.log.Info().Str("session", n.session).Str("item", n.id).Stringer("reverse_path", n.reverse).
		Array("forward_path", pathArray(m.Envelope.ForwardPaths)).Int64("bytes", n.size).Int("from", int(from)).Msg("item.received")
	q.poke()
	return nil
}

// isNewOrder says whether an order is another than that of the item before.
func (q *Queue) isNewOrder(id string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	before := q.lastOrder
	q.lastOrder = id
	return id != before
}

// keep makes an item durable, both its message and its state or neither: until the state is there the message is not accepted.
func (q *Queue) keep(m *Moved, content mail.Content, n *entry) error {
	done, err := q.health.begin(q.o.Now())
	if err != nil {
		return err
	}
	err = q.spool.Put([]spool.Draft{{ID: m.ID, Envelope: &m.Envelope, Content: content}}, true)
	if err == nil {
		if err = q.saveState(m.ID, n.state(), false); err != nil {
			_ = q.spool.Drop([]string{m.ID}) // the error that counts is known
		}
	}
	done(q.o.Now(), q.log, err)
	return err
}

// check says what is wrong with an item that another node gives, or gives its state.
func (m *Moved) check() (*state, error) {
	if !mail.IsID(m.ID) { // it becomes a file's name
		return nil, fmt.Errorf("bad item: ID %q", m.ID)
	}
	if m.Order != "" && !mail.IsID(m.Order) {
		return nil, fmt.Errorf("bad item: order %q", m.Order)
	}
	count := len(m.Envelope.ForwardPaths)
	if count == 0 || m.Size < 0 || m.Size > maxMoved || m.Envelope.ReceivedAt.IsZero() {
		return nil, fmt.Errorf("bad item: %d forward-paths, %d octets", count, m.Size)
	}
	if n := len(m.Envelope.Params); n != 0 && n != count {
		return nil, fmt.Errorf("bad item: parameters of %d of %d forward-paths", n, count)
	}
	for _, p := range append([]mail.Path{m.Envelope.ReversePath}, m.Envelope.ForwardPaths...) {
		if again, err := mail.ParsePath(p.String()); err != nil || again != p {
			return nil, fmt.Errorf("bad item: address %q", p)
		}
	}
	s, err := decodeState(m.State)
	if err != nil {
		return nil, fmt.Errorf("bad item: %w", err)
	}
	closed := make(map[int]bool)
	for _, i := range s.Done {
		if i < 0 || i >= count || closed[i] {
			return nil, fmt.Errorf("bad item: forward-path %d", i)
		}
		closed[i] = true
	}
	if len(closed) == count || s.Attempts < 0 || s.Paused < 0 {
		return nil, errors.New("bad item: state")
	}
	return s, nil
}

// readContent reads so many octets; done lets go of them.
func (q *Queue) readContent(r io.Reader, size int64) (c mail.Content, done func(), err error) {
	if size <= inMemory {
		b := make([]byte, size)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, nil, fmt.Errorf("read content: %w", err)
		}
		return bytes.NewReader(b), func() {}, nil
	}
	f, err := os.CreateTemp(filepath.Join(q.o.Dir, "new"), "move-")
	if err != nil {
		return nil, nil, refusal(err)
	}
	done = func() { _ = f.Close() }
	if err := os.Remove(f.Name()); err != nil { // without a name nothing is left of it, however we end
		done()
		return nil, nil, refusal(err)
	}
	if _, err := io.CopyN(f, r, size); err != nil {
		done()
		return nil, nil, fmt.Errorf("read content: %w", err)
	}
	return io.NewSectionReader(f, 0, size), done, nil
}
