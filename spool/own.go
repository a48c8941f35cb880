package spool

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// putOwn writes a large message's file; its name is not durable yet.
func (s *Spool) putOwn(d Draft, head []byte, held bool) (*message, error) {
	temp, path := filepath.Join(s.dir, "new", d.ID), filepath.Join(s.dir, "own", d.ID)
	file, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, full(err)
	}
	b := make([]byte, 0, max(256<<10, 2*len(head)))
	b = appendHead(appendHeader(b, s.mark), s.mark, kindMessage, flagsOf(held), d.ID, head, d.Content.Size())
	if err = writeContent(file, b, d.Content); err == nil {
		err = file.Sync()
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = file.Close()
		_ = os.Remove(temp)
		return nil, full(err)
	}
	size := recordSize(d.ID, len(head), d.Content.Size())
	return &message{
		at:      place{&segment{path: path, file: file, size: headerSize + size, live: 1}, headerSize, size},
		content: d.Content.Size(), held: held,
	}, nil
}

// forgetOwn removes a large message's file.
func (s *Spool) forgetOwn(m *message) error {
	seg := m.at.seg
	err := os.Remove(seg.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if seg.gone = true; seg.refs == 0 {
		_ = seg.file.Close()
	}
	return err
}
