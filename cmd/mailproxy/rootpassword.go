package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"mailproxy/cluster"
)

// pamSocket is where systemd listens for mailproxy-pam: systemd/mailproxy-pam.socket.
const pamSocket = "/run/mailproxy-pam.sock"

// pamTimeout is more than PAM takes for a wrong password, and what mailproxy-pam ends after.
const pamTimeout = 30 * time.Second

// checkRootPassword asks mailproxy-pam, at socket, whether a password that came from an address is root's here. Any "no" is
// cluster.ErrWrongPassword. The question and the answers are in cmd/mailproxy-pam/main.c.
func checkRootPassword(ctx context.Context, socket, from, password string) error {
	ctx, cancel := context.WithTimeout(ctx, pamTimeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	c := raw.(*net.UnixConn)
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() }) // closed twice at worst
	defer stop()
	if _, err := io.WriteString(c, from+"\n"+password); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(c, 16))
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("mailproxy-pam: %w", ctx.Err())
	case err != nil:
		return fmt.Errorf("mailproxy-pam: %w", err)
	}
	switch string(answer) {
	case "right\n":
		return nil
	case "wrong\n":
		return cluster.ErrWrongPassword
	}
	return fmt.Errorf("mailproxy-pam: answer %q; its journal says why", answer)
}
