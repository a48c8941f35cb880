package spool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"

	"mailproxy/mail"
)

// Sizes.
const (
	// segmentSize is where the next segment is begun.
	segmentSize = 64 << 20
	// ownSize is from where a message has a file of its own.
	ownSize = 1 << 20
	// fillSize bounds what waits to be written: who comes with more waits.
	fillSize = 16 << 20
)

// A place is where a record lies.
type place struct {
	seg  *segment
	off  int64
	size int64 // of the whole record
}

// A message in the index.
type message struct {
	at      place
	state   place // seg is nil where none was set
	trying  place // seg is nil while no attempt is under way
	content int64 // octets
	held    bool
	gone    bool      // its removal is on the way
	tried   time.Time // since when one is
	version int       // counts the records about it that were given to the committer
	pending int       // those that are not on the disk yet
}

// A Spool is a directory of messages. Its methods may be called by many at once, those about one message one after the other.
type Spool struct {
	dir         string
	mark        mark
	room        *semaphore.Weighted // of fillSize
	segmentSize int64
	own         dirSync // of own/
	top         *os.File

	kick, tidyKick      chan struct{} // capacity 1
	committed, tidyDone chan struct{} // closed when those have ended
	closing             chan struct{}

	mu       sync.Mutex
	messages map[string]*message
	filling  *batch
	segments []*segment          // closed ones, the oldest first
	active   *segment            // the committer's, which alone begins and ends it
	last     int64               // the newest segment's number; the committer's
	logged   int64               // octets in the log
	living   int64               // octets of records in it that are not dead
	owed     map[string]*message // removals that the disk did not take, or not yet
	damaged  int                 // files in damaged/
	aside    []string            // those that were put there since Aside was asked
	closed   bool

	inspect *Report // set: the files are only read
}

// Close ends the spool once what was given to it is written. What would write is ErrClosed then.
func (s *Spool) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	if s.inspect == nil {
		close(s.closing)
		<-s.tidyDone
		close(s.kick)
		<-s.committed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active != nil {
		s.segments = append(s.segments, s.active)
	}
	s.closeFiles()
	return nil
}

func (s *Spool) closeFiles() {
	for _, f := range []*os.File{s.top, s.own.dir} {
		if f != nil {
			_ = f.Close()
		}
	}
	for _, seg := range s.segments {
		_ = seg.file.Close()
	}
	for _, m := range s.messages {
		if m.at.seg.number == 0 {
			_ = m.at.seg.file.Close()
		}
	}
}

// Free is how many octets the spool's file system has left.
func (s *Spool) Free() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(s.top.Fd()), &st); err != nil {
		return 0, fmt.Errorf("look for room: %w", err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// Room gives ErrFull where less than minFree octets, or next to no inodes, would be left after size more.
func (s *Spool) Room(size, minFree int64) error {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(s.top.Fd()), &st); err != nil {
		return fmt.Errorf("look for room: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free-size < minFree {
		return fmt.Errorf("%w: %d octets free", ErrFull, free)
	}
	if st.Files > 0 && st.Ffree < 64 {
		return fmt.Errorf("%w: %d inodes free", ErrFull, st.Ffree)
	}
	return nil
}

// A Draft is a message to be put.
type Draft struct {
	ID       string
	Envelope *mail.Envelope
	Content  mail.Content
}

// Put makes the drafts durable, all or none. Their IDs are new, or those of messages whose removal is on the disk.
func (s *Spool) Put(drafts []Draft, held bool) (err error) {
	if err := s.unused(drafts); err != nil {
		return err
	}
	var large []*message
	var entries []entry
	small := make([]string, 0, len(drafts))
	defer func() {
		if err == nil {
			return
		}
		for _, m := range large {
			_ = s.forgetOwn(m) // the error that counts is known
		}
		if len(large) > 0 {
			_ = s.own.sync() // as above
		}
	}()
	var size int64
	for _, d := range drafts {
		if d.Content.Size() < ownSize {
			size += d.Content.Size()
		}
	}
	size = min(size, fillSize)
	_ = s.room.Acquire(context.Background(), size) // never fails
	defer s.room.Release(size)
	for _, d := range drafts {
		head, err := json.Marshal(d.Envelope)
		if err != nil {
			return &ContentError{err}
		}
		if len(head) > maxHead {
			return badHead(len(head))
		}
		if d.Content.Size() >= ownSize {
			m, err := s.putOwn(d, head, held)
			if err != nil {
				return err
			}
			large = append(large, m)
			continue
		}
		b := buffers.Get().(*[]byte)
		*b = appendHead(*b, s.mark, kindMessage, flagsOf(held), d.ID, head, d.Content.Size())
		if *b, err = appendContent(*b, d.Content); err != nil {
			return err
		}
		entries = append(entries, entry{b: b, apply: s.placed(d.ID, d.Content.Size(), int64(len(*b)), held)})
		small = append(small, d.ID)
	}
	if len(large) > 0 {
		if err := s.own.sync(); err != nil {
			return full(err)
		}
	}
	if len(small) > 0 {
		s.mu.Lock()
		if err := s.joinUnlock(entries...); err != nil {
			return err
		}
	}
	s.mu.Lock()
	for i, j := 0, 0; i < len(drafts); i++ {
		if drafts[i].Content.Size() >= ownSize {
			s.messages[drafts[i].ID] = large[j]
			j++
		}
	}
	s.mu.Unlock()
	return nil
}

// unused refuses IDs that have a message, or a removal on its way, which would take what is put now.
func (s *Spool) unused(drafts []Draft) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range drafts {
		if s.messages[d.ID] != nil || s.owed[d.ID] != nil {
			return &ContentError{fmt.Errorf("a message %s is there, or being removed", d.ID)}
		}
	}
	return nil
}

func flagsOf(held bool) byte {
	if held {
		return flagHeld
	}
	return 0
}

// placed gives what enters a message of the log into the index.
func (s *Spool) placed(id string, content, size int64, held bool) func(*segment, int64) {
	return func(seg *segment, off int64) {
		m := &message{content: content, held: held}
		s.setLocked(&m.at, place{seg, off, size})
		s.messages[id] = m
	}
}

// joinUnlock gives entries to the committer, unlocks, and waits until they are on the disk.
func (s *Spool) joinUnlock(entries ...entry) error {
	b := s.joinLocked(true, entries...)
	s.mu.Unlock()
	<-b.done
	return b.err
}

// aboutLocked makes the entry of a record without content about a message, which is not copied while that is on its way.
func (s *Spool) aboutLocked(k kind, flags byte, id string, m *message, head []byte, apply func(*segment, int64)) entry {
	b := buffers.Get().(*[]byte)
	*b = appendSmall(*b, s.mark, k, flags, id, head)
	m.version++
	m.pending++
	return entry{b, m, apply}
}

// Release decides that held messages are accepted, all or none, durably.
func (s *Spool) Release(ids []string) error {
	s.mu.Lock()
	messages := make([]*message, len(ids))
	for i, id := range ids {
		if messages[i] = s.messages[id]; messages[i] == nil || !messages[i].held || messages[i].gone {
			s.mu.Unlock()
			return ErrNoSuch
		}
	}
	entries := make([]entry, len(ids))
	for i, id := range ids {
		entries[i] = s.stateLocked(id, messages[i], nil, 0)
	}
	return s.joinUnlock(entries...)
}

// stateLocked makes the entry of a state, which takes the place of the one before.
func (s *Spool) stateLocked(id string, m *message, state []byte, flags byte) entry {
	size := recordSize(id, len(state), 0)
	return s.aboutLocked(kindState, flags, id, m, state, func(seg *segment, off int64) { s.stateAtLocked(m, place{seg, off, size}, flags) })
}

func (s *Spool) stateAtLocked(m *message, p place, flags byte) {
	s.setLocked(&m.state, p)
	if m.held = false; flags&flagTrying == 0 {
		s.setLocked(&m.trying, place{})
	}
}

// setLocked puts a record in the place of another; the zero place is none.
func (s *Spool) setLocked(at *place, p place) {
	s.buryLocked(*at)
	if *at = p; p.seg != nil {
		p.seg.live++
		if p.seg.number != 0 {
			s.living += p.size
		}
	}
}

// buryLocked counts a record as dead.
func (s *Spool) buryLocked(p place) {
	if p.seg == nil {
		return
	}
	p.seg.live--
	if p.seg.number != 0 {
		s.living -= p.size
	}
}

func (s *Spool) buryAllLocked(m *message) {
	for _, p := range []place{m.at, m.state, m.trying} {
		s.buryLocked(p)
	}
}

// SetState keeps what became of a message so far, in the place of what was kept before, durably. A held message is accepted by it.
// Unless trying says that it goes on, an attempt has ended by it.
func (s *Spool) SetState(id string, state []byte, trying bool) error {
	s.mu.Lock()
	m := s.messages[id]
	if m == nil || m.gone {
		s.mu.Unlock()
		return ErrNoSuch
	}
	if len(state) > maxHead {
		s.mu.Unlock()
		return &ContentError{fmt.Errorf("state of %d octets", len(state))}
	}
	flags := byte(0)
	if trying {
		flags = flagTrying
	}
	return s.joinUnlock(s.stateLocked(id, m, state, flags))
}

// Mark notes that an attempt is under way, for a process that is killed. SetState may end it, as Unmark and Remove do.
func (s *Spool) Mark(id string, since time.Time) error {
	return s.note(kindTrying, id, since, appendTime(since))
}

func appendTime(t time.Time) []byte { return t.UTC().AppendFormat(nil, time.RFC3339Nano) }

// Unmark notes that an attempt has ended and changed nothing.
func (s *Spool) Unmark(id string) error { return s.note(kindEnded, id, time.Time{}, nil) }

func (s *Spool) note(k kind, id string, since time.Time, head []byte) error {
	s.mu.Lock()
	m := s.messages[id]
	if m == nil || m.gone {
		s.mu.Unlock()
		return ErrNoSuch
	}
	size := recordSize(id, len(head), 0)
	b := s.joinLocked(false, s.aboutLocked(k, 0, id, m, head, func(seg *segment, off int64) {
		if k == kindEnded {
			s.setLocked(&m.trying, place{})
			return
		}
		s.setLocked(&m.trying, place{seg, off, size})
		m.tried = since
	}))
	s.mu.Unlock()
	<-b.written
	return b.writeErr
}

// Drop removes held messages that were not accepted after all, also where a Release has failed.
func (s *Spool) Drop(ids []string) error {
	var own []*message
	s.mu.Lock()
	for _, id := range ids {
		m := s.messages[id]
		if m == nil || m.gone {
			continue
		}
		if m.at.seg.number == 0 {
			s.ownGoneLocked(id, m)
			own = append(own, m)
			continue
		}
		m.gone = true
		delete(s.messages, id)
		s.owed[id] = m // nobody waits for it: where the disk does not take it, it is written with what comes next
		s.joinLocked(false, s.removalLocked(id, m))
	}
	s.mu.Unlock()
	var err error
	for _, m := range own {
		err = errors.Join(err, s.forgetOwn(m))
	}
	return err
}

// ownGoneLocked takes a large message out of the index: what remains is to remove its file.
func (s *Spool) ownGoneLocked(id string, m *message) {
	m.gone = true
	delete(s.messages, id)
	s.buryAllLocked(m)
}

// removalLocked makes the entry that removes a message of the log.
func (s *Spool) removalLocked(id string, m *message) entry {
	return s.aboutLocked(kindRemoved, 0, id, m, nil, func(*segment, int64) { s.removedLocked(id, m) })
}

func (s *Spool) removedLocked(id string, m *message) {
	s.buryAllLocked(m)
	delete(s.messages, id)
	delete(s.owed, id)
}

// Remove removes a message durably. On an error it is not there any more for this process, and its removal is tried again with the next
// record that is written; until then a restart finds it.
func (s *Spool) Remove(id string) error {
	s.mu.Lock()
	m := s.messages[id]
	if m == nil || m.gone {
		s.mu.Unlock()
		return nil
	}
	if m.at.seg.number == 0 {
		s.ownGoneLocked(id, m)
		s.mu.Unlock()
		if err := s.forgetOwn(m); err != nil {
			return err
		}
		return s.own.sync()
	}
	m.gone = true
	err := s.joinUnlock(s.removalLocked(id, m))
	if errors.Is(err, ErrFull) {
		err = s.removeInPlace(id, m)
	}
	if err != nil {
		s.mu.Lock()
		s.owed[id] = m
		s.mu.Unlock()
	}
	return err
}

// owedLocked gives the removals that the disk did not take, again.
func (s *Spool) owedLocked() (entries []entry) {
	for id, m := range s.owed {
		if m.pending == 0 {
			entries = append(entries, s.removalLocked(id, m))
		}
	}
	return entries
}

// removeInPlace removes a message where there is no room for a record: a full disk can still be drained.
func (s *Spool) removeInPlace(id string, m *message) error {
	if _, err := m.at.seg.file.WriteAt([]byte{dead}, m.at.off+offDead); err != nil {
		return err
	}
	if err := fdatasync(m.at.seg.file); err != nil {
		return err
	}
	s.mu.Lock()
	s.removedLocked(id, m)
	s.mu.Unlock()
	s.pokeTidy()
	return nil
}

// SetAside copies a damaged message's record to damaged/, and removes the message.
func (s *Spool) SetAside(id string) error {
	at, err := s.find(id)
	if err != nil {
		return err
	}
	err = s.keepAside(id, at.seg.file, at.off, at.size)
	s.mu.Lock()
	s.unrefLocked(at.seg)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.Remove(id)
}

// Aside gives the names of what was set aside in damaged/ since it was asked last.
func (s *Spool) Aside() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := s.aside
	s.aside = nil
	return names
}

// Damaged counts what lies in damaged/.
func (s *Spool) Damaged() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.damaged
}
