package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/smtpd"
	"mailproxy/web"
)

// listeners are the doors that are opened before anything else, while we may still be root.
type listeners struct {
	smtp    []mailListener
	web     []net.Listener
	agent   []net.Listener
	control net.Listener
}

// A mailListener is one that takes mail, and what for.
type mailListener struct {
	net.Listener
	kind smtpd.Kind
}

// openListeners opens all, or none; those that systemd has kept are open already.
func openListeners(ctx context.Context, l *config.Local, log zerolog.Logger) (*listeners, error) {
	o := &listeners{}
	var addresses []string
	if l.Runs(config.ServiceSMTP) {
		addresses = slices.Concat(l.SMTP.Listen, l.SMTP.TLSListen, l.Internal.Listen, l.Internal.TLSListen)
	}
	kept := inherit(log, addresses)
	err := o.open(ctx, l, &kept)
	kept.close()
	if err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

func (o *listeners) open(ctx context.Context, l *config.Local, kept *inherited) (err error) {
	if l.Runs(config.ServiceSMTP) {
		if err := o.openMail(ctx, l, kept); err != nil {
			return err
		}
	}
	if l.Runs(config.ServiceWeb) {
		if o.web, err = listen(ctx, "web", l.Web.Listen, &inherited{}); err != nil {
			return err
		}
	}
	if o.agent, err = listen(ctx, "agent", l.Agent.Listen, &inherited{}); err != nil {
		return err
	}
	o.control, err = web.ListenControl(l.ControlSocket())
	return err
}

// openMail opens the listeners for mail. Where mail from our networks has its own, [smtp] is for the Internet alone.
func (o *listeners) openMail(ctx context.Context, l *config.Local, kept *inherited) error {
	outside := smtpd.Any
	if l.HasInternal() {
		outside = smtpd.MX
	}
	for _, s := range []struct {
		section string
		listen  []string
		kind    smtpd.Kind
	}{
		{"smtp", l.SMTP.Listen, smtpd.Kind{Purpose: outside}},
		{"smtp", l.SMTP.TLSListen, smtpd.Kind{Purpose: outside, TLS: true}},
		{"internal", l.Internal.Listen, smtpd.Kind{Purpose: smtpd.Internal}},
		{"internal", l.Internal.TLSListen, smtpd.Kind{Purpose: smtpd.Internal, TLS: true}},
	} {
		opened, err := listen(ctx, s.section, s.listen, kept)
		for _, x := range opened {
			o.smtp = append(o.smtp, mailListener{x, s.kind})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// listen opens TCP listeners, but for those that are kept; those that were opened before an error are given with it.
func listen(ctx context.Context, section string, addresses []string, kept *inherited) ([]net.Listener, error) {
	var all []net.Listener
	var lc net.ListenConfig
	for _, a := range addresses {
		if l := kept.take(a); l != nil {
			all = append(all, l)
			continue
		}
		l, err := lc.Listen(ctx, "tcp", a)
		if err != nil {
			return all, listenError(section, a, err)
		}
		all = append(all, l)
	}
	return all, nil
}

func listenError(section, address string, err error) error {
	_, port, splitErr := net.SplitHostPort(address)
	if errors.Is(err, syscall.EADDRINUSE) && splitErr == nil {
		return withHint(fmt.Errorf("[%s] listen %s: the port is in use", section, address), `"ss -ltnp sport = :%s" shows by whom`, port)
	}
	if errors.Is(err, syscall.EACCES) {
		return withHint(fmt.Errorf("[%s] listen %s: %w", section, address, syscall.EACCES),
			"ports below 1024 need root or CAP_NET_BIND_SERVICE: start it by systemd, or as root")
	}
	return fmt.Errorf("[%s] %w", section, err)
}

func (o *listeners) close() {
	for _, l := range o.smtp {
		_ = l.Close()
	}
	for _, l := range slices.Concat(o.web, o.agent) {
		_ = l.Close()
	}
	if o.control != nil {
		_ = o.control.Close()
	}
}
