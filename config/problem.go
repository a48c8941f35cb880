package config

import (
	"errors"
	"fmt"
)

// A Problem is one thing that is wrong with a configuration.
type Problem struct {
	// Object is what it is about, as the commands call it: `domain example.test`, `setting idle_timeout`.
	Object string `json:"object"`
	// Reason says what is wrong with it.
	Reason string `json:"reason"`
	// Line is where the object stands in the text that it was read from, from 1; 0 when it came from no text.
	Line int `json:"line,omitempty"`
}

// Error gives "line 7: domain example.test: no transport of that name".
func (p *Problem) Error() string {
	s := p.Reason
	if p.Object != "" {
		s = p.Object + ": " + s
	}
	if p.Line > 0 {
		s = fmt.Sprintf("line %d: %s", p.Line, s)
	}
	return s
}

// Problems takes apart what Validate and ParseText joined; errors that are no Problem are left out.
func Problems(err error) []*Problem {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var all []*Problem
		for _, e := range joined.Unwrap() {
			all = append(all, Problems(e)...)
		}
		return all
	}
	var p *Problem
	if errors.As(err, &p) {
		return []*Problem{p}
	}
	return nil
}

// collector gathers problems; lines, where there are any, says in which line an object stands.
type collector struct {
	lines map[string]int
	errs  []error
}

func (c *collector) add(object, format string, args ...any) {
	c.errs = append(c.errs, &Problem{Object: object, Reason: fmt.Sprintf(format, args...), Line: c.lines[object]})
}

func (c *collector) err() error { return errors.Join(c.errs...) }
