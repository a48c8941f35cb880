package spool

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/semaphore"

	"mailproxy/internal/durable"
)

// Open reads the spool in dir, which is made where it is missing. Only a small index of it stays in memory. One process may have it open.
func Open(dir string) (*Spool, error) { return openSized(dir, segmentSize) }

func openSized(dir string, segmentSize int64) (*Spool, error) {
	s := &Spool{
		dir: dir, segmentSize: segmentSize, room: semaphore.NewWeighted(fillSize),
		kick: make(chan struct{}, 1), tidyKick: make(chan struct{}, 1),
		committed: make(chan struct{}), tidyDone: make(chan struct{}), closing: make(chan struct{}),
		messages: make(map[string]*message), owed: make(map[string]*message),
	}
	if err := s.open(); err != nil {
		s.closeFiles()
		return nil, fmt.Errorf("open the spool: %w", err)
	}
	go s.commit()
	go s.tidy()
	s.pokeTidy()
	return s, nil
}

func (s *Spool) open() (err error) {
	for _, sub := range []string{"", "new", "own", "log", "damaged"} {
		if err := os.MkdirAll(filepath.Join(s.dir, sub), 0o700); err != nil {
			return err
		}
	}
	if left, err := filepath.Glob(filepath.Join(s.dir, "item", "*")); err != nil || len(left) > 0 {
		return fmt.Errorf("%s holds %d files of an earlier version: empty that queue with it first (%w)", s.dir, len(left), errors.ErrUnsupported)
	}
	for _, made := range []string{s.dir, filepath.Dir(s.dir)} { // the names of log/ and of the spool itself
		if err := durable.SyncDir(made); err != nil {
			return err
		}
	}
	if s.top, err = os.Open(s.dir); err != nil {
		return err
	}
	if s.own.dir, err = os.Open(filepath.Join(s.dir, "own")); err != nil {
		return err
	}
	left, err := filepath.Glob(filepath.Join(s.dir, "new", "*"))
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	if s.mark, err = findMark(s.dir); err != nil {
		return err
	}
	if err := s.replayOwn(); err != nil {
		return err
	}
	if err := s.replayLog(); err != nil {
		return err
	}
	aside, err := os.ReadDir(filepath.Join(s.dir, "damaged"))
	s.damaged = len(aside)
	return err
}

// logNames gives the numbers of the segments, rising.
func logNames(dir string) (numbers []int64, err error) {
	names, err := os.ReadDir(filepath.Join(dir, "log"))
	for _, e := range names {
		if n, ok := segmentNumber(e.Name()); ok {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, err
}

func logPath(dir string, number int64) string {
	return filepath.Join(dir, "log", fmt.Sprintf("%016x", number))
}

// findMark gives the mark that the spool's files have, or a new one. Where heads are damaged, the first that is whole tells.
func findMark(dir string) (m mark, err error) {
	numbers, err := logNames(dir)
	if err != nil {
		return m, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "own", "*"))
	if err != nil {
		return m, err
	}
	for _, n := range numbers {
		files = append(files, logPath(dir, n))
	}
	for _, name := range files {
		b := make([]byte, headerSize)
		file, err := os.Open(name)
		if err != nil {
			return m, err
		}
		_, err = io.ReadFull(file, b)
		_ = file.Close()
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return m, err
		}
		if m, err := parseHeader(b); err == nil {
			return m, nil
		}
	}
	_, _ = rand.Read(m[:]) // never fails (crypto/rand)
	return m, nil
}

// mode is how the spool's files are opened.
func (s *Spool) mode() int {
	if s.inspect != nil {
		return os.O_RDONLY
	}
	return os.O_RDWR
}

// replayOwn reads the large messages.
func (s *Spool) replayOwn() error {
	names, err := os.ReadDir(filepath.Join(s.dir, "own"))
	if err != nil {
		return err
	}
	for _, e := range names {
		id, path := e.Name(), filepath.Join(s.dir, "own", e.Name())
		file, err := os.OpenFile(path, s.mode(), 0)
		if err != nil {
			return err
		}
		info, err := file.Stat()
		if err != nil {
			_ = file.Close()
			return err
		}
		r, err := readRecord(file, s.mark, headerSize, info.Size(), make([]byte, 4<<10))
		if err == nil && (r.id != id || r.kind != kindMessage) {
			err = DamagedError("another message's record")
		}
		if errors.Is(err, ErrDamaged) {
			_ = file.Close()
			if s.inspect != nil {
				s.inspect.Bad = append(s.inspect.Bad, Bad{path, 0, info.Size(), id, err.Error()})
				continue
			}
			if err := os.Rename(path, filepath.Join(s.dir, "damaged", id)); err != nil {
				return err
			}
			s.aside = append(s.aside, id)
			continue
		}
		if err != nil {
			_ = file.Close()
			return err
		}
		seg := &segment{path: path, file: file, size: info.Size(), live: 1}
		s.messages[id] = &message{at: place{seg, headerSize, r.total()}, content: r.size, held: r.held()}
	}
	return nil
}

// replayLog reads the segments, the oldest first.
func (s *Spool) replayLog() error {
	numbers, err := logNames(s.dir)
	if err != nil {
		return err
	}
	for i, n := range numbers {
		file, err := os.OpenFile(logPath(s.dir, n), s.mode(), 0)
		if err != nil {
			return err
		}
		seg := &segment{number: n, path: file.Name(), file: file}
		s.segments, s.last = append(s.segments, seg), n
		info, err := file.Stat()
		if err != nil {
			return err
		}
		seg.size = info.Size()
		if err := s.replay(seg, i == len(numbers)-1); err != nil {
			return err
		}
		s.logged += seg.size
	}
	return nil
}

// replay reads one segment. Of the newest the contents are read too: it may have been written to when the power went.
func (s *Spool) replay(seg *segment, newest bool) error {
	return scan(seg.file, s.mark, seg.size, newest, func(r record) error {
		s.replayRecord(seg, r)
		return nil
	}, func(off, size int64) error {
		if s.inspect != nil {
			s.inspect.stretch(seg, newest, off, size)
			return nil
		}
		tail := off+size == seg.size
		if tail && newest {
			if err := seg.file.Truncate(off); err != nil {
				return err
			}
			seg.size = off
			return fdatasync(seg.file)
		}
		if err := s.keepAside(fmt.Sprintf("%s-%x", filepath.Base(seg.path), off), seg.file, off, size); err != nil {
			return err
		}
		return closeGap(seg, s.mark, off, size)
	})
}

// scan calls each for every record of a segment, and bad for every stretch that is none. With contents, these are checked too.
func scan(file io.ReaderAt, m mark, size int64, contents bool, each func(record) error, bad func(off, size int64) error) error {
	buf := make([]byte, 4<<10)
	read := func(off int64) (record, error) {
		r, err := readRecord(file, m, off, size, buf)
		if err == nil && contents && r.kind != kindGap {
			err = checkContent(file, r.contentOff(), r.size)
		}
		return r, err
	}
	for off := int64(headerSize); off < size; {
		r, err := read(off)
		if err == nil {
			if err := each(r); err != nil {
				return err
			}
			off += r.total()
			continue
		}
		next := off
		for errors.Is(err, ErrDamaged) && next < size {
			if next, err = nextRecord(file, m, next+1, size, buf); err == nil && next < size {
				_, err = read(next)
			}
		}
		if err != nil {
			return err
		}
		if err := bad(off, next-off); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// nextRecord looks for the next whole head from off on; size where there is none.
func nextRecord(file io.ReaderAt, m mark, off, size int64, buf []byte) (int64, error) {
	part := make([]byte, 64<<10)
	for off < size {
		n, err := file.ReadAt(part[:min(int64(len(part)), size-off)], off)
		if n == 0 {
			return 0, err
		}
		for at := 0; ; at++ {
			i := bytes.Index(part[at:n], m[:])
			if i < 0 {
				break
			}
			at += i
			_, err := readRecord(file, m, off+int64(at), size, buf)
			if err == nil {
				return off + int64(at), nil
			}
			if !errors.Is(err, ErrDamaged) {
				return 0, err
			}
		}
		if off+int64(n) >= size {
			break
		}
		off += int64(n - min(n-1, markSize-1))
	}
	return size, nil
}

// closeGap makes a stretch that was set aside one record, where it is long enough for one, so that it is set aside once.
func closeGap(seg *segment, m mark, off, size int64) error {
	content := size - headSize - tailSize
	if content < 0 {
		return nil
	}
	if _, err := seg.file.WriteAt(appendHead(nil, m, kindGap, 0, "", nil, content), off); err != nil {
		return err
	}
	return fdatasync(seg.file)
}

// replayRecord takes a record into the index.
func (s *Spool) replayRecord(seg *segment, r record) {
	m := s.messages[r.id]
	at := place{seg, r.off, r.total()}
	switch {
	case r.kind == kindMessage && r.dead, r.kind == kindRemoved:
		if m != nil {
			s.buryAllLocked(m)
			delete(s.messages, r.id)
		}
	case r.kind == kindMessage: // a copy takes the place of what was copied
		if m != nil {
			s.buryAllLocked(m)
		}
		m = &message{content: r.size, held: r.held()}
		s.setLocked(&m.at, at)
		s.messages[r.id] = m
	case m == nil: // of one that was removed
	case r.kind == kindState:
		s.stateAtLocked(m, at, r.flags)
	case r.kind == kindTrying:
		s.setLocked(&m.trying, at)
		if m.tried, _ = time.Parse(time.RFC3339Nano, string(r.head)); m.tried.IsZero() {
			m.tried = time.Unix(0, 0) // when is not known
		}
	case r.kind == kindEnded:
		s.setLocked(&m.trying, place{})
	}
}

// keepAside copies a stretch to damaged/name, as a segment.
func (s *Spool) keepAside(name string, file io.ReaderAt, off, size int64) error {
	err := durable.Create(filepath.Join(s.dir, "damaged", name), 0o600, func(w io.Writer) error {
		if _, err := w.Write(appendHeader(nil, s.mark)); err != nil {
			return err
		}
		_, err := io.Copy(w, io.NewSectionReader(file, off, size))
		return err
	})
	if errors.Is(err, os.ErrExist) { // by a process that was killed right behind it
		return nil
	}
	if err == nil {
		s.mu.Lock()
		s.damaged++
		s.aside = append(s.aside, name)
		s.mu.Unlock()
	}
	return full(err)
}
