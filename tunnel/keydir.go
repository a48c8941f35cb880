package tunnel

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// A keyDir is the directory of keys. Its files are written whole: temporary file, fsync, rename, fsync of the directory; mode 0600;
// owned by whoever owns the directory above it, so that what a command makes as root the daemon can read as another user. Names are
// resolved inside the directory only: a symbolic link that its owner plants leads root nowhere else.
type keyDir struct {
	root     *os.Root
	uid, gid int
	chown    bool
}

// openKeyDir opens dir and makes it (0700) where it is missing.
func openKeyDir(dir string) (*keyDir, error) {
	dir = filepath.Clean(dir)
	above, base := filepath.Split(dir)
	if above == "" {
		above = "."
	}
	if err := os.MkdirAll(above, 0o755); err != nil {
		return nil, err
	}
	parent, err := os.OpenRoot(above)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := parent.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	d := &keyDir{chown: os.Geteuid() == 0}
	if d.chown {
		if d.uid, d.gid, err = owner(parent, "."); err != nil {
			return nil, err
		}
		// Lchown: the directory's owner may have put a link here.
		if err := parent.Lchown(base, d.uid, d.gid); err != nil {
			return nil, err
		}
	}
	d.root, err = parent.OpenRoot(base)
	return d, err
}

// openKeyDirToRead opens dir and leaves it as it is.
func openKeyDirToRead(dir string) (*keyDir, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &keyDir{root: root}, nil
}

func owner(root *os.Root, name string) (uid, gid int, err error) {
	info, err := root.Stat(name)
	if err != nil {
		return 0, 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("owner of %s is not known", name)
	}
	return int(st.Uid), int(st.Gid), nil
}

func (d *keyDir) close() { d.root.Close() }

// temporary writes data to a new synced file and gives its name.
func (d *keyDir) temporary(name string, data []byte) (string, error) {
	var random [8]byte
	rand.Read(random[:]) // never fails
	tmp := "." + name + "." + hex.EncodeToString(random[:])
	f, err := d.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil && d.chown {
		err = f.Chown(d.uid, d.gid)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		d.root.Remove(tmp) //nolint:errcheck // the first error counts
		return "", err
	}
	return tmp, nil
}

// write replaces name durably.
func (d *keyDir) write(name string, data []byte) error {
	tmp, err := d.temporary(name, data)
	if err != nil {
		return err
	}
	if err := d.root.Rename(tmp, name); err != nil {
		d.root.Remove(tmp) //nolint:errcheck // the first error counts
		return err
	}
	return d.sync()
}

// create makes name durably unless it is there: then fs.ErrExist, and of two that create at once one wins whole.
func (d *keyDir) create(name string, data []byte) error {
	tmp, err := d.temporary(name, data)
	if err != nil {
		return err
	}
	defer d.root.Remove(tmp) //nolint:errcheck // a second name of the same file
	if err := d.root.Link(tmp, name); err != nil {
		return err
	}
	return d.sync()
}

func (d *keyDir) sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// maxKeyFileBytes bounds what is read of a file in the key directory; trust.json with its members is the longest.
const maxKeyFileBytes = 8 << 20

func (d *keyDir) read(name string) ([]byte, error) {
	info, err := d.root.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxKeyFileBytes {
		return nil, fmt.Errorf("%s: %d bytes, more than %d", name, info.Size(), maxKeyFileBytes)
	}
	return d.root.ReadFile(name)
}
