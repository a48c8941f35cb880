package queue

import (
	"container/heap"
	"errors"
	"io/fs"
	"os"
	"strings"
)

// load reads the spool at start. Only the small view of each item stays in memory.
func (q *Queue) load() error {
	var held, states, tries []string
	err := q.files.list(func(name string) error {
		id, suffix, _ := strings.Cut(name, ".")
		switch "." + suffix {
		case heldSuffix:
			held = append(held, id)
		case stateSuffix:
			states = append(states, id)
		case trySuffix:
			tries = append(tries, id)
		default:
			return q.loadItem(name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range held {
		if err := os.Remove(q.files.item(id + heldSuffix)); err != nil {
			return err
		}
		q.log.Info().Str("item", id).Str("reason", "held and never answered").Msg("item.done")
	}
	if err := q.loadCuts(tries); err != nil {
		return err
	}
	for _, id := range states { // of items whose removal was cut
		if q.items[id] == nil {
			if err := os.Remove(q.files.item(id + stateSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	heap.Init(&q.due)
	q.counts.Damaged, err = q.files.damaged()
	return err
}

func (q *Queue) loadItem(name string) error {
	m, err := q.files.open(name)
	if err == nil {
		defer m.close()
		var s *state
		if s, err = q.files.state(name); err == nil {
			n := newEntry(name, m.content.Size(), m.envelope, s)
			q.items[name] = n
			n.position = len(q.due)
			q.due = append(q.due, n)
			return nil
		}
	}
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	q.log.Error().Str("item", name).AnErr("err", err).Str("file", q.files.item(name)).Msg("spool.damaged")
	return q.files.setAside(name)
}

// loadCuts names the attempts that were under way when the daemon was killed: what they had sent may arrive a second time.
func (q *Queue) loadCuts(tries []string) error {
	for _, id := range tries {
		when, err := q.files.marked(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if n := q.items[id]; n != nil {
			q.counts.Cut++
			q.log.Warn().Str("item", id).Time("since", when).Int("attempt", n.attempts+1).Msg("attempt.cut")
		}
	}
	return nil
}
