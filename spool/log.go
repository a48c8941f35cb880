package spool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"mailproxy/internal/durable"
)

// A segment is one file of the log, or a large message's own. Its fields are guarded by Spool.mu, but size is the committer's.
type segment struct {
	number int64 // 0: a large message's own
	path   string
	file   *os.File
	size   int64
	live   int  // records in it that are not dead: of messages and states
	refs   int  // who reads it just now
	gone   bool // deleted: closed with the last reader
	fresh  bool // its name is not on the disk yet
	dirty  bool // the last batch was not synced
}

// An entry is one record of a batch. about is the message that it is about, nil for a new one; apply is called under Spool.mu once it is
// on the disk, nil for nothing.
type entry struct {
	b     *[]byte
	about *message
	apply func(seg *segment, off int64)
}

// A batch is what is written and synced together.
type batch struct {
	entries []entry
	size    int64
	sync    bool
	written chan struct{} // closed when a process that is killed would leave it there, or writeErr is set
	done    chan struct{} // closed when it is on the disk, or err is set

	writeErr, err error
}

func newBatch() *batch { return &batch{written: make(chan struct{}), done: make(chan struct{})} }

// joinLocked adds entries to the batch that is filling.
func (s *Spool) joinLocked(sync bool, entries ...entry) *batch {
	if s.closed {
		b := newBatch()
		b.err, b.writeErr = ErrClosed, ErrClosed
		close(b.written)
		close(b.done)
		return b
	}
	b := s.filling
	if b == nil {
		b = newBatch()
		s.filling = b
		b.add(s.owedLocked()...)
	}
	b.add(entries...)
	b.sync = b.sync || sync
	select {
	case s.kick <- struct{}{}:
	default:
	}
	return b
}

func (b *batch) add(entries ...entry) {
	for _, e := range entries {
		b.size += int64(len(*e.b))
	}
	b.entries = append(b.entries, entries...)
}

// commit writes batch after batch until the spool is closed and none is left.
func (s *Spool) commit() {
	defer close(s.committed)
	for range s.kick {
		for {
			s.mu.Lock()
			b := s.filling
			s.filling = nil
			s.mu.Unlock()
			if b == nil {
				break
			}
			s.write(b)
		}
	}
}

// write makes a batch durable.
func (s *Spool) write(b *batch) {
	seg, err := s.segmentFor(b.size)
	var off int64
	if err == nil {
		off = seg.size
		err = s.put(seg, b)
	} else {
		b.writeErr = err
		close(b.written)
	}
	s.mu.Lock()
	if b.err = err; err == nil {
		seg.size = off + b.size
		s.logged += b.size
	}
	for _, e := range b.entries {
		if e.about != nil {
			e.about.pending--
		}
		if err == nil && e.apply != nil {
			e.apply(seg, off)
		}
		off += int64(len(*e.b))
	}
	s.retireLocked()
	s.mu.Unlock()
	for _, e := range b.entries {
		putBuffer(e.b)
	}
	close(b.done)
	s.pokeTidy()
}

// put writes the octets of a batch behind those of the segment, and syncs them. On an error they are taken back, and unless there was just
// no room the next batch goes into another segment: what an error of the disk left in this file is not known.
func (s *Spool) put(seg *segment, b *batch) error {
	err := writev(seg.file, b.entries, seg.size)
	b.writeErr = full(err)
	close(b.written)
	if err == nil && b.sync {
		err = s.syncSegment(seg)
	} else if err == nil {
		seg.dirty = true
	}
	if err == nil {
		return nil
	}
	if seg.file.Truncate(seg.size) == nil && errors.Is(b.writeErr, ErrFull) { // the error that counts is known
		return b.writeErr
	}
	s.mu.Lock()
	s.segments, s.active = append(s.segments, seg), nil
	s.mu.Unlock()
	return full(err)
}

func (s *Spool) syncSegment(seg *segment) error {
	if err := fdatasync(seg.file); err != nil {
		return err
	}
	seg.dirty = false
	if seg.fresh {
		if err := durable.SyncDir(filepath.Dir(seg.path)); err != nil {
			return err
		}
		seg.fresh = false
	}
	return nil
}

// segmentFor gives the segment that a batch goes into.
func (s *Spool) segmentFor(size int64) (*segment, error) {
	if seg := s.active; seg != nil && (seg.size+size <= s.segmentSize || seg.size == headerSize) {
		return seg, nil
	}
	if seg := s.active; seg != nil {
		if seg.dirty {
			if err := s.syncSegment(seg); err != nil { // else a power cut could look like damage
				return nil, full(err)
			}
		}
		s.mu.Lock()
		s.segments, s.active = append(s.segments, seg), nil
		s.mu.Unlock()
	}
	s.last++
	path := filepath.Join(s.dir, "log", fmt.Sprintf("%016x", s.last))
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, full(err)
	}
	if _, err := file.WriteAt(appendHeader(nil, s.mark), 0); err != nil {
		_ = file.Close()
		_ = os.Remove(path)
		return nil, full(err)
	}
	seg := &segment{number: s.last, path: path, file: file, size: headerSize, fresh: true}
	s.mu.Lock()
	s.active = seg
	s.logged += headerSize
	s.mu.Unlock()
	return seg, nil
}

// retireLocked lets go of the newest segment where nothing in it is live, so that it can be deleted.
func (s *Spool) retireLocked() {
	if seg := s.active; seg != nil && seg.live == 0 && seg.size > s.segmentSize/16 && s.filling == nil {
		s.segments, s.active = append(s.segments, seg), nil
	}
}

// writev writes the entries at off with as few calls as it takes.
func writev(file *os.File, entries []entry, off int64) error {
	const most = 1024 // IOV_MAX
	var vec [][]byte
	for len(entries) > 0 || len(vec) > 0 {
		for len(entries) > 0 && len(vec) < most {
			vec = append(vec, *entries[0].b)
			entries = entries[1:]
		}
		n, err := unix.Pwritev(int(file.Fd()), vec, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "write", Path: file.Name(), Err: err}
		}
		for off += int64(n); len(vec) > 0 && n >= len(vec[0]); vec = vec[1:] {
			n -= len(vec[0])
		}
		if n > 0 {
			vec[0] = vec[0][n:]
		}
	}
	return nil
}

func fdatasync(file *os.File) error {
	for {
		switch err := unix.Fdatasync(int(file.Fd())); err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return &os.PathError{Op: "fdatasync", Path: file.Name(), Err: err}
		}
	}
}

func segmentNumber(name string) (int64, bool) {
	if len(name) != 16 {
		return 0, false
	}
	n, err := strconv.ParseInt(name, 16, 64)
	return n, err == nil && n > 0
}
