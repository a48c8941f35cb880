package web

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// ListenControl opens the control socket, 0600 from its first moment, in the place of one that a daemon left behind. Whoever
// calls it must hold the node's lock. The file goes when the listener is closed.
func ListenControl(path string) (net.Listener, error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // it would remove the name that it was made under
	if err = protect(fresh); err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(fresh)
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	return &socket{l, path}, nil
}

// protect gives the socket its mode. We may be root, and its directory the daemon's: what a link there leads to is left alone.
func protect(path string) error {
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return dir.Chmod(filepath.Base(path), 0o600)
}

// socket removes its file when it is closed.
type socket struct {
	*net.UnixListener
	path string
}

// Close is part of net.Listener.
func (s *socket) Close() error {
	err := s.UnixListener.Close()
	if err == nil { // the second call must not remove a successor's
		_ = os.Remove(s.path)
	}
	return err
}
