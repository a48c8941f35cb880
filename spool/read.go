package spool

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"time"

	"mailproxy/mail"
)

// A Message is one that is open for reading.
type Message struct {
	Envelope *mail.Envelope
	Content  *io.SectionReader
	s        *Spool
	seg      *segment
}

// Close lets go of the message.
func (m *Message) Close() {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	m.s.unrefLocked(m.seg)
}

func (s *Spool) unrefLocked(seg *segment) {
	if seg.refs--; seg.refs == 0 && seg.gone {
		_ = seg.file.Close()
	}
}

// Check reads the content through and compares it with its checksum. The error wraps ErrDamaged, or is the disk's.
func (m *Message) Check() error {
	_, off, size := m.Content.Outer()
	return checkContent(m.seg.file, off, size)
}

// find gives a message's place, with a reader's hold on its segment.
func (s *Spool) find(id string) (place, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.messages[id]
	if m == nil || m.gone {
		return place{}, ErrNoSuch
	}
	m.at.seg.refs++
	return m.at, nil
}

// Open opens a message; its envelope is checked, its content is not. The error is ErrNoSuch, wraps ErrDamaged, or is the disk's.
func (s *Spool) Open(id string) (*Message, error) {
	at, err := s.find(id)
	if err != nil {
		return nil, err
	}
	m := &Message{s: s, seg: at.seg}
	r, e, err := s.readMessage(at, id)
	if err != nil {
		m.Close()
		return nil, err
	}
	m.Envelope, m.Content = e, io.NewSectionReader(at.seg.file, r.contentOff(), r.size)
	return m, nil
}

func (s *Spool) readMessage(at place, id string) (record, *mail.Envelope, error) {
	b := buffers.Get().(*[]byte)
	defer putBuffer(b)
	r, err := readRecord(at.seg.file, s.mark, at.off, at.off+at.size, (*b)[:cap(*b)])
	if err != nil {
		return r, nil, err
	}
	e, err := r.envelope()
	if err == nil && r.id != id {
		err = DamagedError("another message's record")
	}
	return r, e, err
}

func (r *record) envelope() (*mail.Envelope, error) {
	e := new(mail.Envelope)
	if err := json.Unmarshal(r.head, e); err != nil {
		return nil, DamagedError("envelope: " + err.Error())
	}
	if len(e.ForwardPaths) == 0 {
		return nil, DamagedError("envelope without forward-paths")
	}
	return e, nil
}

// A Found is a message as it lies in the spool.
type Found struct {
	ID       string
	Envelope *mail.Envelope
	Size     int64 // of the content, in octets
	Held     bool
	State    []byte // nil where none was set
	Tried    time.Time
}

// Each calls f for every message, in no order. What cannot be read for damage is given to bad instead.
func (s *Spool) Each(f func(Found) error, bad func(id string, err error) error) error {
	s.mu.Lock()
	ids := make([]string, 0, len(s.messages))
	for id := range s.messages {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	for _, id := range ids {
		found, err := s.look(id)
		switch {
		case errors.Is(err, ErrNoSuch):
			continue
		case errors.Is(err, ErrDamaged):
			err = bad(id, err)
		case err == nil:
			err = f(found)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Spool) look(id string) (Found, error) {
	s.mu.Lock()
	m := s.messages[id]
	if m == nil || m.gone {
		s.mu.Unlock()
		return Found{}, ErrNoSuch
	}
	at, state := m.at, m.state
	found := Found{ID: id, Size: m.content, Held: m.held}
	if m.trying.seg != nil {
		found.Tried = m.tried
	}
	at.seg.refs++
	if state.seg != nil {
		state.seg.refs++
	}
	s.mu.Unlock()
	var err error
	if _, found.Envelope, err = s.readMessage(at, id); err == nil && state.seg != nil {
		var r record
		r, err = readRecord(state.seg.file, s.mark, state.off, state.off+state.size, make([]byte, state.size))
		if len(r.head) > 0 {
			found.State = bytes.Clone(r.head)
		}
	}
	s.mu.Lock()
	s.unrefLocked(at.seg)
	if state.seg != nil {
		s.unrefLocked(state.seg)
	}
	s.mu.Unlock()
	return found, err
}
