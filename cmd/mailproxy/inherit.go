package main

import (
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

// SMTP's listeners are kept by systemd while the daemon is restarted (FileDescriptorStoreMax of the unit), so that no connection is
// refused meanwhile: it waits for the next daemon. The walk:
//
//  1. inherit takes what systemd passes (LISTEN_FDS): what the daemon before gave to it, or the sockets of a unit of the administrator's.
//     Those that the node file names no more are given up, here and there, before any is opened.
//  2. listen takes one that is there for an address, and opens the others.
//  3. keepListeners gives all to systemd.
//
// Where the service is stopped, and not restarted, systemd lets go of them.

// storeName is the name of the listeners in systemd's store.
const storeName = "smtp"

// barrierTimeout is how long systemd may take to do what it was told.
const barrierTimeout = 5 * time.Second

// inherited are listeners that were passed by systemd.
type inherited []net.Listener

// inherit takes what systemd passes, and gives up what is none of addresses.
func inherit(log zerolog.Logger, addresses []string) inherited {
	var wanted, stale inherited
	for _, f := range activation.Files(true) {
		l, err := net.FileListener(f)
		_ = f.Close()
		if err != nil {
			log.Warn().Err(err).Str("file", f.Name()).Msg("listener.unknown")
			continue
		}
		if slices.ContainsFunc(addresses, func(a string) bool { return listensOn(l, a) }) {
			wanted = append(wanted, l)
		} else {
			stale = append(stale, l)
		}
	}
	if len(stale) == 0 {
		return wanted
	}
	for _, l := range stale {
		log.Info().Stringer("address", l.Addr()).Msg("listener.dropped")
		_ = l.Close()
	}
	err := tellSystemd("FDSTOREREMOVE=1\nFDNAME=" + storeName)
	if err == nil {
		err = systemdBarrier() // else it may hold the port that is wanted now
	}
	if err != nil {
		log.Warn().Err(err).Msg("systemd.deaf")
	}
	return wanted
}

// listensOn says whether a listener is the one that an address would open.
func listensOn(l net.Listener, address string) bool {
	have, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return false
	}
	want, err := net.ResolveTCPAddr("tcp", address)
	if err != nil || want.Port != have.Port {
		return false
	}
	if want.IP == nil || want.IP.IsUnspecified() { // one that we open for all addresses has those of both families
		return have.IP.IsUnspecified()
	}
	return want.IP.Equal(have.IP)
}

// take gives the listener of an address, and takes it out; nil where there is none.
func (i *inherited) take(address string) net.Listener {
	at := slices.IndexFunc(*i, func(l net.Listener) bool { return listensOn(l, address) })
	if at < 0 {
		return nil
	}
	l := (*i)[at]
	*i = slices.Delete(*i, at, at+1)
	return l
}

func (i inherited) close() {
	for _, l := range i {
		_ = l.Close()
	}
}

// keepListeners gives listeners to systemd's store. What it has already it does not take again.
func keepListeners(listeners []mailListener) error {
	for _, l := range listeners {
		tcp, ok := l.Listener.(*net.TCPListener)
		if !ok {
			continue
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			return err
		}
		var told error
		if err := raw.Control(func(fd uintptr) {
			told = tellSystemd("FDSTORE=1\nFDPOLL=0\nFDNAME="+storeName, int(fd))
		}); err != nil {
			return err
		}
		if told != nil {
			return told
		}
	}
	return nil
}

// tellSystemd sends a notification with files (sd_pid_notify_with_fds(3)), where it started us.
func tellSystemd(state string, fds ...int) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(socket, []byte(state), rights, &unix.SockaddrUnix{Name: path}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return nil
}

// systemdBarrier waits until systemd has done what it was told before.
func systemdBarrier() error {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	raw, err := w.SyscallConn()
	if err == nil {
		var told error
		if err = raw.Control(func(fd uintptr) { told = tellSystemd("BARRIER=1", int(fd)) }); err == nil {
			err = told
		}
	}
	_ = w.Close()
	if err != nil {
		return err
	}
	_ = r.SetReadDeadline(time.Now().Add(barrierTimeout))
	if _, err := r.Read(make([]byte, 1)); os.IsTimeout(err) { // its end comes when systemd has closed its side
		return fmt.Errorf("barrier: %w", err)
	}
	return nil
}
