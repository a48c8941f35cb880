package spool

import (
	"os"
)

// tidySlack is how many segments of dead records are left lying.
const tidySlack = 2

// pokeTidy has the log looked at.
func (s *Spool) pokeTidy() {
	select {
	case s.tidyKick <- struct{}{}:
	default:
	}
}

// tidy deletes segments and copies what is left in them until the spool is closed.
func (s *Spool) tidy() {
	defer close(s.tidyDone)
	for {
		select {
		case <-s.closing:
			return
		case <-s.tidyKick:
		}
		s.deleteDead()
		for victim := s.victim(); victim != nil; victim = s.victim() {
			if !s.copyLive(victim) {
				break
			}
			s.deleteDead()
			if !victim.gone { // a removal is on its way, and wakes us when it is there
				break
			}
		}
	}
}

// deleteDead deletes the oldest segments as long as nothing in them is live. A newer one is not deleted before an older one: it may tell
// of removals there.
func (s *Spool) deleteDead() {
	for {
		s.mu.Lock()
		if len(s.segments) == 0 || s.segments[0].live != 0 { // a count that is wrong must not cost mail
			s.mu.Unlock()
			return
		}
		seg := s.segments[0]
		s.mu.Unlock()
		if err := os.Remove(seg.path); err != nil && !os.IsNotExist(err) {
			return
		}
		s.mu.Lock()
		s.segments = s.segments[1:]
		s.logged -= seg.size
		if seg.gone = true; seg.refs == 0 {
			_ = seg.file.Close()
		}
		s.mu.Unlock()
	}
}

// victim gives the oldest segment where more of the log is dead than may be.
func (s *Spool) victim() *segment {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.segments) == 0 || s.logged <= 2*s.living+tidySlack*s.segmentSize && int64(len(s.segments)) <= 8+2*s.living/s.segmentSize {
		return nil
	}
	return s.segments[0]
}

// copyLive copies what is live in a segment to the end of the log; false where that was not possible just now.
func (s *Spool) copyLive(victim *segment) bool {
	s.mu.Lock()
	var ids []string
	for id, m := range s.messages {
		if m.at.seg == victim || m.state.seg == victim || m.trying.seg == victim {
			ids = append(ids, id)
		}
	}
	s.mu.Unlock()
	for _, id := range ids {
		if !s.copy(id) {
			return false
		}
	}
	return true
}

// copy appends what the log has of a message anew; false where that was not possible just now.
func (s *Spool) copy(id string) bool {
	for {
		s.mu.Lock()
		m := s.messages[id]
		if m == nil {
			s.mu.Unlock()
			return true
		}
		if m.pending > 0 { // the copy would come to lie behind what is newer
			if s.joinUnlock() != nil {
				return false
			}
			continue
		}
		if m.gone { // its removal is owed
			s.mu.Unlock()
			return false
		}
		version, at := m.version, [...]*place{&m.at, &m.state, &m.trying}
		var from [len(at)]place
		for i, p := range at {
			from[i] = *p
		}
		s.mu.Unlock()
		var entries []entry
		for i, p := range from {
			if p.seg == nil || p.seg.number == 0 {
				continue
			}
			b, err := raw(p)
			if err != nil {
				return false
			}
			entries = append(entries, entry{b, m, func(seg *segment, off int64) {
				if m.gone && m.at.seg.number == 0 { // what it had is buried already
					return
				}
				s.setLocked(at[i], place{seg, off, p.size})
			}})
		}
		s.mu.Lock()
		if m.version != version || m.gone {
			s.mu.Unlock()
			continue
		}
		m.pending += len(entries)
		return s.joinUnlock(entries...) == nil
	}
}

// raw reads a record as it is.
func raw(p place) (*[]byte, error) {
	b := buffers.Get().(*[]byte)
	if int64(cap(*b)) < p.size {
		*b = make([]byte, 0, p.size)
	}
	*b = (*b)[:p.size]
	if _, err := p.seg.file.ReadAt(*b, p.off); err != nil {
		return nil, err
	}
	return b, nil
}
