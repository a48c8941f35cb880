package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/db"
	"mailproxy/smtpd"
)

// recorder notes in which order parts start and end.
type recorder struct {
	mu     sync.Mutex
	events []string
}

func (r *recorder) note(e string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *recorder) stopped() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

func (r *recorder) part(name string, takes time.Duration) part {
	return part{name, func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(takes) // synthetic time
		r.note(name)
		return ctx.Err()
	}, 10 * time.Second}
}

func TestPartsStopFromTheLastToTheFirstEachAfterTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var r recorder
		err := runParts(ctx, zerolog.Nop(), []part{r.part("postgres", 0), r.part("queue", 3*time.Second), r.part("smtp", 5*time.Second)}, cancel)
		if err != nil {
			t.Error(err)
		}
		if want := []string{"smtp", "queue", "postgres"}; !slices.Equal(r.stopped(), want) {
			t.Errorf("stopped %v, want %v", r.stopped(), want)
		}
	})
}

func TestAPartThatDoesNotEndKeepsNoOtherFromEnding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var r recorder
		start := time.Now()
		err := runParts(ctx, zerolog.Nop(), []part{r.part("postgres", 0), r.part("smtp", time.Hour)}, cancel)
		if err == nil || err.Error() != "smtp did not end within 10s" {
			t.Errorf("error %v", err)
		}
		if !slices.Equal(r.stopped(), []string{"postgres"}) || time.Since(start) != 10*time.Second {
			t.Errorf("stopped %v after %v", r.stopped(), time.Since(start))
		}
		time.Sleep(time.Hour) // synthetic: what was left behind ends too
	})
}

func TestAPartThatEndsByItselfStopsTheDaemon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		broken := part{"smtp", func(context.Context) error { return errors.New("accept: broken") }, time.Second}
		err := runParts(t.Context(), zerolog.Nop(), []part{r.part("postgres", 0), broken}, func() {})
		if err == nil || err.Error() != "smtp: accept: broken" {
			t.Errorf("error %v", err)
		}
		if !slices.Equal(r.stopped(), []string{"postgres"}) {
			t.Errorf("stopped %v", r.stopped())
		}
	})
}

// Whatever has a Run is run, and stopped when nothing above needs it any more.
func TestEveryPartIsRun(t *testing.T) {
	d := &daemon{instance: &db.Instance{}, smtpd: &smtpd.Server{}}
	var names []string
	for _, p := range d.parts() {
		names = append(names, p.name)
	}
	if want := []string{"postgres", "web", "tunnel", "cluster", "configuration", "relay", "queue", "smtp"}; !slices.Equal(names, want) {
		t.Errorf("parts %v, want %v", names, want)
	}
}
