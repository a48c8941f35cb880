package spool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// A Report is what Inspect found.
type Report struct {
	Messages int   `json:"messages"` // without held ones
	Held     int   `json:"held"`
	Octets   int64 `json:"octets"` // of their contents
	Segments int   `json:"segments"`
	LogSize  int64 `json:"log_octets"`
	// Tail is how many octets at the end of the log are no whole record: it was being written.
	Tail int64 `json:"tail_octets"`
	// Bad are what is no record elsewhere, or whose content is damaged.
	Bad []Bad `json:"bad,omitempty"`
	// Aside are the names of the files in damaged/.
	Aside []string `json:"damaged,omitempty"`
}

// A Bad is a stretch of a file, or, with an ID, a message whose checksum is wrong.
type Bad struct {
	File   string `json:"file"`
	Offset int64  `json:"offset"`
	Octets int64  `json:"octets"`
	ID     string `json:"id,omitempty"`
	Error  string `json:"error"`
}

// Inspect reads the spool in dir and checks every record, and changes nothing. The Spool that it gives is for Each, Open and Close. While
// another process has the spool open, what is written meanwhile may show as a tail.
func Inspect(dir string) (*Spool, Report, error) {
	s := &Spool{dir: dir, inspect: &Report{}, messages: make(map[string]*message)}
	err := s.read()
	if err == nil {
		err = s.checkAll()
	}
	if err != nil {
		s.closeFiles()
		return nil, Report{}, fmt.Errorf("read the spool: %w", err)
	}
	return s, *s.inspect, nil
}

func (s *Spool) read() (err error) {
	if s.mark, err = findMark(s.dir); err != nil {
		return err
	}
	if err := s.replayOwn(); err != nil {
		return err
	}
	if err := s.replayLog(); err != nil {
		return err
	}
	s.inspect.Segments, s.inspect.LogSize = len(s.segments), s.logged
	aside, err := os.ReadDir(filepath.Join(s.dir, "damaged"))
	for _, e := range aside {
		s.inspect.Aside = append(s.inspect.Aside, e.Name())
	}
	return err
}

// checkAll counts the messages, and reads their contents through.
func (s *Spool) checkAll() error {
	var ids []string
	for id := range s.messages {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		m := s.messages[id]
		if m.held {
			s.inspect.Held++
		} else {
			s.inspect.Messages++
		}
		s.inspect.Octets += m.content
		open, err := s.Open(id)
		if err == nil {
			err = open.Check()
			open.Close()
		}
		if errors.Is(err, ErrDamaged) {
			s.inspect.Bad = append(s.inspect.Bad, Bad{m.at.seg.path, m.at.off, m.at.size, id, err.Error()})
		} else if err != nil {
			return err
		}
	}
	return nil
}

// stretch notes one that is no record.
func (r *Report) stretch(seg *segment, newest bool, off, size int64) {
	if newest && off+size == seg.size {
		r.Tail = size
		return
	}
	r.Bad = append(r.Bad, Bad{File: seg.path, Offset: off, Octets: size, Error: "no record"})
}
