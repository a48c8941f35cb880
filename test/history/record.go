package history

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"sync"
	"time"
)

// ErrFact is a fact that says nothing, or two things.
var ErrFact = errors.New("not one fact")

// maxLine bounds a line of a stored run, in bytes.
const maxLine = 64 << 20

// A Recorder keeps facts in the order in which they are noted. Its methods may be called at once from several goroutines.
type Recorder struct {
	mu    sync.Mutex
	out   *json.Encoder // nil: facts are kept in memory alone
	facts []Fact
}

// NewRecorder gives a recorder that writes each fact to w, too, as a line of JSON; w may be nil.
func NewRecorder(w io.Writer) *Recorder {
	r := &Recorder{}
	if w != nil {
		r.out = json.NewEncoder(w)
	}
	return r
}

// Note keeps a fact; one without a time is of now.
func (r *Recorder) Note(f Fact) error {
	if err := f.check(); err != nil {
		return err
	}
	if f.At.IsZero() {
		f.At = time.Now()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.facts = append(r.facts, f)
	if r.out == nil {
		return nil
	}
	if err := r.out.Encode(f); err != nil {
		return fmt.Errorf("store fact: %w", err)
	}
	return nil
}

// Facts gives all that was noted so far.
func (r *Recorder) Facts() []Fact {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Fact(nil), r.facts...)
}

// Read gives the facts of a stored run. An error names the line.
func Read(in io.Reader) ([]Fact, error) {
	var facts []Fact
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for n := 1; lines.Scan(); n++ {
		var f Fact
		err := json.Unmarshal(lines.Bytes(), &f)
		if err == nil {
			err = f.check()
		}
		if err != nil {
			return facts, fmt.Errorf("line %d: %w", n, err)
		}
		facts = append(facts, f)
	}
	if err := lines.Err(); err != nil {
		return facts, fmt.Errorf("read facts: %w", err)
	}
	return facts, nil
}

// check makes sure that exactly one thing is said.
func (f Fact) check() error {
	said := 0
	v := reflect.ValueOf(f)
	for i := range v.NumField() {
		if v.Field(i).Kind() == reflect.Pointer && !v.Field(i).IsNil() {
			said++
		}
	}
	if said != 1 {
		return fmt.Errorf("%w but %d", ErrFact, said)
	}
	return nil
}
