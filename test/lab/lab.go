package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"
)

// A Lab is hosts on one network. Its methods, and those of different hosts, may be called at once from several goroutines; of several
// processes one at a time may change it.
type Lab struct {
	dir      string
	template func() (string, error)

	mu    sync.Mutex
	state state
}

// state is what lab.json holds.
type state struct {
	Bin  string `json:"bin"`
	Made int    `json:"made"` // hosts that were ever made
	// Servers are the process IDs of what runs beside the hosts: the DNS server, the receiving MTA.
	Servers map[string]int `json:"servers,omitempty"`
	Hosts   []*Host        `json:"hosts"`
}

// ErrNoHost is for an ID that no host has.
var ErrNoHost = errors.New("no such host")

func stateFile(dir string) string { return filepath.Join(dir, "lab.json") }

// New makes a lab without hosts in a directory, for the programs mailproxy and pmgcm in bin. Its caller is in a sandbox that has none yet.
func New(dir, bin string) (*Lab, error) {
	l := newLab(dir)
	l.state.Bin = bin
	if err := ip(fmt.Sprintf("link add %[1]s type bridge\nlink set %[1]s addrgenmode none up\naddr add %[2]s%[3]s dev %[1]s\n", bridge, HubAddress, prefix)); err != nil {
		return nil, err
	}
	return l, l.save()
}

// Open gives the lab that another process of the sandbox has made.
func Open(dir string) (*Lab, error) {
	l := newLab(dir)
	b, err := os.ReadFile(stateFile(dir))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &l.state); err != nil {
		return nil, fmt.Errorf("%s: %w", stateFile(dir), err)
	}
	for _, h := range l.state.Hosts {
		if err := l.own(h); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func newLab(dir string) *Lab {
	l := &Lab{dir: dir, state: state{Servers: map[string]int{}}}
	l.template = sync.OnceValues(l.makeTemplate)
	return l
}

// save writes lab.json.
func (l *Lab) save() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.saveLocked()
}

func (l *Lab) saveLocked() error {
	b, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return err
	}
	next := stateFile(l.dir) + ".new"
	if err := os.WriteFile(next, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(next, stateFile(l.dir))
}

// change changes what lab.json says.
func (l *Lab) change(f func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	return l.saveLocked()
}

// Hosts are all that are there, in the order in which they were made.
func (l *Lab) Hosts() []*Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.state.Hosts)
}

// Host gives a host by its ID; ErrNoHost.
func (l *Lab) Host(id string) (*Host, error) {
	for _, h := range l.Hosts() {
		if h.ID == id {
			return h, nil
		}
	}
	return nil, fmt.Errorf("%w: %s", ErrNoHost, id)
}

// HostOptions describe a host.
type HostOptions struct {
	// ID is its short name in the lab, "n1"; empty: the next of h1, h2, ….
	ID string
	// Name is its node's host name.
	Name string
	// Disk is the size of the file system of its state directory, "512m"; empty: it shares that of the lab.
	Disk string
	// Init are more flags for `mailproxy init`.
	Init []string
}

var goodID = regexp.MustCompile(`^[a-z][a-z0-9]{0,7}$`)

// Add makes a host with a node file and a fresh database. Nothing runs there yet.
func (l *Lab) Add(o HostOptions) (*Host, error) {
	from, err := l.Template()
	if err != nil {
		return nil, err
	}
	h, err := l.addBare(o)
	if err != nil {
		return nil, err
	}
	data := h.Local.PostgresDataDir()
	if err := errors.Join(command("cp", "-a", filepath.Join(from, "pg"), data), command("cp", "-a", filepath.Join(from, "pg.made"), data+".made")); err != nil {
		return nil, errors.Join(err, l.Remove(h))
	}
	return h, nil
}

// addBare makes a host without a database.
func (l *Lab) addBare(o HostOptions) (*Host, error) {
	h, err := l.enter(o)
	if err != nil {
		return nil, err
	}
	if err := h.furnish(o); err != nil {
		return nil, errors.Join(err, l.Remove(h))
	}
	return h, nil
}

// enter gives a host its place in lab.json.
func (l *Lab) enter(o HostOptions) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if o.ID == "" {
		o.ID = fmt.Sprintf("h%d", l.state.Made+1)
	}
	if !goodID.MatchString(o.ID) || slices.ContainsFunc(l.state.Hosts, func(h *Host) bool { return h.ID == o.ID }) {
		return nil, fmt.Errorf("%q cannot be the ID of a host: it is taken, or not a letter and up to 7 letters and digits", o.ID)
	}
	h := &Host{ID: o.ID, Name: o.Name, Disk: o.Disk, Address: hostAddress(l.state.Made)}
	h.place(l)
	l.state.Made++
	l.state.Hosts = append(l.state.Hosts, h)
	return h, l.saveLocked()
}

// Remove ends what runs on a host and removes it with its files. What is half made is removed too.
func (l *Lab) Remove(h *Host) error {
	err := h.Kill()
	err = errors.Join(err, h.Slow(0))
	if h.Disk != "" {
		err = errors.Join(err, h.unmount())
	}
	err = errors.Join(err, h.unplug(), os.RemoveAll(h.Dir))
	if h.log != nil {
		_ = h.log.Close()
	}
	return errors.Join(err, l.change(func() {
		l.state.Hosts = slices.DeleteFunc(l.state.Hosts, func(other *Host) bool { return other == h })
	}))
}

// Template gives the directory of a fresh database, `pg` and `pg.made`, of User.
func (l *Lab) Template() (string, error) {
	dir, err := l.template()
	if err != nil {
		return "", fmt.Errorf("template: %w", err)
	}
	return dir, nil
}

// makeTemplate runs a node for as long as it takes to make its database, and gives the directory where that then is. Making one takes
// seconds of both processors.
func (l *Lab) makeTemplate() (string, error) {
	kept := filepath.Join(l.dir, "database")
	if _, err := os.Stat(kept); err == nil {
		return kept, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	h, err := l.addBare(HostOptions{ID: "template", Name: "template.test"})
	if err != nil {
		return "", err
	}
	err = h.Start()
	if err == nil {
		err = Poll(h.Healthy)
	}
	if err == nil {
		err = h.Stop()
	}
	if err == nil {
		err = errors.Join(os.Mkdir(kept+".new", 0o755), command("cp", "-a", h.Local.PostgresDataDir(), kept+".new/pg"),
			command("cp", "-a", h.Local.PostgresDataDir()+".made", kept+".new/pg.made"), os.Rename(kept+".new", kept))
	}
	return kept, errors.Join(err, l.Remove(h))
}

// Patience bounds every wait in a lab; the machine may be busy.
const Patience = 90 * time.Second

// Poll waits until ok gives nil.
func Poll(ok func() error) error { return PollFor(Patience, ok) }

// PollFor is Poll with another bound.
func PollFor(bound time.Duration, ok func() error) error {
	deadline := time.Now().Add(bound)
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not in %v: %w", bound, err)
		}
		time.Sleep(20 * time.Millisecond) // between two looks at a condition
	}
}
