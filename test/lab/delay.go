package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// delayVariable holds what carryFrames does: two interfaces, and what a round trip takes longer.
const delayVariable = "MAILPROXY_LAB_DELAY"

// Bounds of what is on the way in one direction; more is dropped, as by a router.
const (
	maxFrames = 8192
	maxFrame  = 10 + 14 + 4 + 1<<16 // virtio_net_hdr, Ethernet with a VLAN, what the kernel leaves in one piece
)

// carryFrames carries Ethernet frames between two interfaces, each after half of the delay, until it is killed. The kernel has no
// netem everywhere; and whatever is spoken over IP is slowed down by this.
func carryFrames() error {
	var a, b, longer string
	if _, err := fmt.Sscan(os.Getenv(delayVariable), &a, &b, &longer); err != nil {
		return err
	}
	d, err := time.ParseDuration(longer)
	if err != nil {
		return err
	}
	left, err := openInterface(a)
	if err != nil {
		return err
	}
	right, err := openInterface(b)
	if err != nil {
		return err
	}
	fmt.Print("ready")
	failed := make(chan error)
	go func() { failed <- carry(left, right, d/2) }()
	go func() { failed <- carry(right, left, d/2) }()
	return <-failed
}

// openInterface gives a packet socket that hears what arrives at an interface. Frames come and go with the kernel's own header in
// front, so that checksums and segments that are still to be made are made on the other side.
func openInterface(name string) (int, error) {
	itf, err := net.InterfaceByName(name)
	if err != nil {
		return 0, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: itf.Index}),
	)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return fd, nil
}

// carry reads frames and writes each d later.
func carry(from, to int, d time.Duration) error {
	type frame struct {
		due  time.Time
		data []byte
	}
	way := make(chan frame, maxFrames)
	go func() { // ends with the process
		for f := range way {
			time.Sleep(time.Until(f.due)) // that is what it is for
			_, _ = unix.Write(to, f.data) // what the other side does not take is lost
		}
	}()
	buffer := make([]byte, maxFrame)
	for {
		n, err := unix.Read(from, buffer)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN):
			continue
		case err != nil:
			return fmt.Errorf("read frames: %w", err)
		}
		select {
		case way <- frame{time.Now().Add(d), append([]byte(nil), buffer[:n]...)}:
		default:
		}
	}
}
