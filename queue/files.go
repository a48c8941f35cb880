package queue

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"mailproxy/internal/durable"
	"mailproxy/mail"
)

const (
	heldSuffix  = ".held"
	stateSuffix = ".state"
	trySuffix   = ".try"
)

// files is the spool, a file per message. Its methods may be called by many at once, for different items.
type files struct {
	dir   string
	names dirSync // of item/
}

// openFiles makes the directories where they are missing, and empties new/.
func openFiles(dir string) (*files, error) {
	for _, sub := range []string{"", "new", "item", "damaged"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("open the spool: %w", err)
		}
	}
	for _, made := range []string{dir, filepath.Dir(dir)} { // the names of item/ and of the spool itself
		if err := durable.SyncDir(made); err != nil {
			return nil, fmt.Errorf("open the spool: %w", err)
		}
	}
	left, err := os.ReadDir(filepath.Join(dir, "new"))
	if err != nil {
		return nil, fmt.Errorf("open the spool: %w", err)
	}
	for _, e := range left {
		if err := os.Remove(filepath.Join(dir, "new", e.Name())); err != nil {
			return nil, fmt.Errorf("open the spool: %w", err)
		}
	}
	d, err := os.Open(filepath.Join(dir, "item"))
	if err != nil {
		return nil, fmt.Errorf("open the spool: %w", err)
	}
	return &files{dir: dir, names: dirSync{dir: d}}, nil
}

func (f *files) close() error { return f.names.dir.Close() }

func (f *files) item(name string) string { return filepath.Join(f.dir, "item", name) }

// room gives ErrFull where less than minFree octets, or next to no inodes, would be left after size more.
func (f *files) room(size, minFree int64) error {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.names.dir.Fd()), &st); err != nil {
		return fmt.Errorf("look for room: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free-size < minFree {
		return fmt.Errorf("%w: %d octets free", ErrFull, free)
	}
	if st.Files > 0 && st.Ffree < 64 {
		return fmt.Errorf("%w: %d inodes free", ErrFull, st.Ffree)
	}
	return nil
}

// put makes the items durable under their names, all or none.
func (f *files) put(names []string, drafts []Draft) (err error) {
	var temps, placed []string
	defer func() {
		if err == nil {
			return
		}
		for _, p := range append(temps, placed...) {
			_ = os.Remove(p) // a name that is gone already is as good
		}
		if len(placed) > 0 {
			_ = f.names.sync()
		}
	}()
	for i := range drafts {
		temp := filepath.Join(f.dir, "new", names[i])
		temps = append(temps, temp)
		if err := f.writeSynced(temp, func(w io.Writer) error { return writeItem(w, &drafts[i].Envelope, drafts[i].Content) }); err != nil {
			return err
		}
	}
	for i, temp := range temps {
		placed = append(placed, f.item(names[i]))
		if err := os.Rename(temp, f.item(names[i])); err != nil {
			return full(err)
		}
	}
	return full(f.names.sync())
}

// writeSynced makes a file of the name and syncs it.
func (f *files) writeSynced(name string, write func(io.Writer) error) error {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return full(err)
	}
	err = write(file)
	if err == nil {
		err = file.Sync()
	}
	if e := file.Close(); err == nil {
		err = e
	}
	return full(err)
}

// full gives ErrFull for what the kernel says when there is no room.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// release turns held items into accepted ones, durably.
func (f *files) release(ids []string) error {
	for _, id := range ids {
		if err := os.Rename(f.item(id+heldSuffix), f.item(id)); err != nil {
			return err
		}
	}
	return f.names.sync()
}

// dropHeld removes held items, also where a release has got half-way. Nothing depends on when that is durable: at start they
// are removed anyway.
func (f *files) dropHeld(ids []string) error {
	var first error
	for _, id := range ids {
		for _, name := range []string{id + heldSuffix, id} {
			if err := os.Remove(f.item(name)); err != nil && !errors.Is(err, fs.ErrNotExist) && first == nil {
				first = err
			}
		}
	}
	return first
}

// remove removes an item durably. The state goes after the item: without it, closed paths would be open again.
func (f *files) remove(id string) error {
	if err := os.Remove(f.item(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, suffix := range []string{stateSuffix, trySuffix} {
		if err := os.Remove(f.item(id + suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return f.names.sync()
}

// saveState replaces an item's state, durably.
func (f *files) saveState(id string, s *state) error {
	b, err := s.encode()
	if err != nil {
		return err
	}
	temp := filepath.Join(f.dir, "new", id+stateSuffix)
	err = f.writeSynced(temp, func(w io.Writer) error { _, err := w.Write(b); return err })
	if err == nil {
		err = os.Rename(temp, f.item(id+stateSuffix))
	}
	if err != nil {
		_ = os.Remove(temp)
		return full(err)
	}
	return f.names.sync()
}

// A message is an item's file, open.
type message struct {
	file     *os.File
	envelope *mail.Envelope
	content  *io.SectionReader
}

func (m *message) close() { m.file.Close() }

// open opens an item's file and checks its envelope, not its content.
func (f *files) open(name string) (*message, error) {
	file, err := os.Open(f.item(name))
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, err
	}
	e, off, length, err := readHead(file, info.Size())
	if err != nil {
		file.Close()
		return nil, err
	}
	return &message{file: file, envelope: e, content: io.NewSectionReader(file, off, length)}, nil
}

// check compares the content with its checksum.
func (m *message) check() error {
	_, off, length := m.content.Outer()
	return checkContent(m.file, off, length)
}

// state reads an item's state; a fresh one where there is none.
func (f *files) state(id string) (*state, error) {
	b, err := os.ReadFile(f.item(id + stateSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return new(state), nil
	}
	if err != nil {
		return nil, err
	}
	return decodeState(b)
}

// mark notes that an attempt is under way. It is not synced: it is for a daemon that is killed, not for a host that dies.
func (f *files) mark(id string, now time.Time) error {
	return os.WriteFile(f.item(id+trySuffix), []byte(now.UTC().Format(time.RFC3339Nano)+"\n"), 0o600)
}

func (f *files) unmark(id string) { _ = os.Remove(f.item(id + trySuffix)) }

// marked reads a mark and removes it; when is zero where it is not readable.
func (f *files) marked(id string) (when time.Time, err error) {
	b, err := os.ReadFile(f.item(id + trySuffix))
	if err != nil {
		return time.Time{}, err
	}
	when, _ = time.Parse(time.RFC3339Nano, strings.TrimSpace(string(b)))
	return when, os.Remove(f.item(id + trySuffix))
}

// setAside moves an item with what belongs to it to damaged/.
func (f *files) setAside(id string) error {
	for _, suffix := range []string{"", stateSuffix, trySuffix} {
		err := os.Rename(f.item(id+suffix), filepath.Join(f.dir, "damaged", id+suffix))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return f.names.sync()
}

// damaged counts what lies in damaged/, without states and marks.
func (f *files) damaged() (n int, err error) {
	entries, err := os.ReadDir(filepath.Join(f.dir, "damaged"))
	for _, e := range entries {
		if !strings.Contains(e.Name(), ".") {
			n++
		}
	}
	return n, err
}

// list calls each for every name in item/, a bounded number in memory at a time.
func (f *files) list(each func(name string) error) error {
	d, err := os.Open(f.item(""))
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(1000)
		for _, name := range names {
			if err := each(name); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
