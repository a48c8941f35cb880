package web

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// A Check is one thing that can be well or not.
type Check struct {
	// Name is in lower case: database, spool.
	Name string
	// Critical says that no mail should be sent to a node where this is not well: /health answers 503 then.
	Critical bool
	// Func gives nil where all is well. It must obey its context.
	Func func(ctx context.Context) error
}

// CheckResult is what a Check said.
type CheckResult struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Critical bool   `json:"critical"`
	Error    string `json:"error,omitempty"`
	TookMS   int64  `json:"took_ms"`
}

// Health is the answer of GET /health. Status is "ok"; "degraded" where a check failed that is not critical (mail flows); or
// "failed"; or "draining", where all is well and no mail is taken by an operator's wish, or because the daemon is about to stop. The last two are 503.
type Health struct {
	Status  string        `json:"status"`
	Node    string        `json:"node"`
	Version string        `json:"version"`
	Checks  []CheckResult `json:"checks"`
}

const (
	checkTimeout = time.Second
	// healthAge is how old an answer may be, so that asking often costs nothing.
	healthAge = time.Second
)

// checker runs the checks side by side, at most once a healthAge.
type checker struct {
	checks []Check
	now    func() time.Time

	mu      sync.Mutex
	results []CheckResult // guarded by mu
	at      time.Time     // guarded by mu: when results were taken
}

func (c *checker) run() []CheckResult {
	c.mu.Lock() // held while checking: whoever else asks waits for the same answer
	defer c.mu.Unlock()
	if c.results != nil && c.now().Sub(c.at) < healthAge {
		return c.results
	}
	// Not the request's context: the answer is for all who ask.
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	results := make([]CheckResult, len(c.checks))
	var wg sync.WaitGroup
	for i, check := range c.checks {
		wg.Go(func() {
			start := time.Now()
			err := runCheck(ctx, check)
			results[i] = CheckResult{Name: check.Name, OK: err == nil, Critical: check.Critical, TookMS: time.Since(start).Milliseconds()}
			if err != nil {
				results[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	c.results, c.at = results, c.now()
	return results
}

func runCheck(ctx context.Context, c Check) (err error) {
	defer func() {
		if p := recover(); p != nil { // one broken check must not take the others' answers away
			err = fmt.Errorf("check ended in a panic: %v", p)
		}
	}()
	return c.Func(ctx)
}

func status(results []CheckResult) string {
	worst := "ok"
	for _, r := range results {
		switch {
		case !r.OK && r.Critical:
			return "failed"
		case !r.OK:
			worst = "degraded"
		}
	}
	return worst
}
