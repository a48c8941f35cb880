package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/internal/version"
)

func serveCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "run the daemon",
		Description: "Opens its listeners by the last configuration that is on the disk, tells systemd that it is ready, and brings up " +
			"PostgreSQL and the cluster beside that. SIGTERM and SIGINT end it in order: sessions that are open are answered for up to " +
			"30 s, PostgreSQL is stopped last; a second one ends it at once. Logs are JSON on standard error.",
		Flags:  []cli.Flag{&cli.StringFlag{Name: "log-level", Value: "info", Usage: "least `LEVEL` to log: debug, info, warn or error"}},
		Action: serve,
	}
}

func serve(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	level, err := zerolog.ParseLevel(c.String("log-level"))
	if err != nil || level == zerolog.NoLevel {
		return usagef("serve: --log-level %q is none of debug, info, warn, error", c.String("log-level"))
	}
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return noNodeFile(err)
	}
	log := newLogger(c.App.ErrWriter, level)

	who, err := daemonAccount(local)
	if err != nil {
		return err
	}
	locks, err := takeLocks(local)
	if err != nil {
		return err
	}
	defer locks.close()
	if err := prepareDirs(local, who); err != nil {
		return err
	}
	ctx, stop := onSignals(c.Context, log)
	defer stop()
	doors, err := openListeners(ctx, local, log)
	if err != nil {
		return err
	}
	defer doors.close()
	d, err := build(local, doors, log)
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.tunnel.Listen(); err != nil { // the last door; it may need root too
		return tunnelListenError(err)
	}
	if err := who.give(local.ControlSocket()); err != nil {
		return err
	}
	if err := who.become(); err != nil {
		return err
	}
	if err := checkWritable(local); err != nil {
		return err
	}
	if err := d.open(); err != nil { // what is read and made on the disk, as the user that will use it
		return err
	}
	log.Info().Str("version", version.String()).Str("node", local.Name).Int("pid", os.Getpid()).Strs("services", local.Services).
		Msg("daemon.started")
	if err := keepListeners(doors.smtp); err != nil {
		log.Warn().Err(err).Msg("systemd.deaf")
	}
	err = runParts(ctx, log, d.parts(), func() { notify(log, systemd.SdNotifyReady) })
	log.Info().Err(err).Msg("daemon.stopped")
	return err
}

func newLogger(w io.Writer, level zerolog.Level) zerolog.Logger {
	return zerolog.New(zerolog.SyncWriter(w)).Level(level).With().Timestamp().Logger()
}

func tunnelListenError(err error) error {
	op, ok := errors.AsType[*net.OpError](err)
	if !ok || op.Addr == nil {
		return err
	}
	return listenError("tunnel", op.Addr.String(), err)
}

// onSignals gives a context that the first SIGTERM or SIGINT ends. The second one ends the process, with the spool as safe as
// after a crash, and PostgreSQL left running for the next daemon to adopt.
func onSignals(parent context.Context, log zerolog.Logger) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	ended := make(chan struct{})
	go func() {
		for count := 0; ; count++ {
			select {
			case s := <-signals:
				if count > 0 {
					log.Warn().Str("signal", s.String()).Msg("daemon.killed")
					os.Exit(1)
				}
				log.Info().Str("signal", s.String()).Msg("daemon.stopping")
				notify(log, systemd.SdNotifyStopping)
				cancel()
			case <-ended:
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(ended)
		cancel()
	}
}

// notify tells systemd, where it started us.
func notify(log zerolog.Logger, state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.Warn().Err(err).Msg("systemd.deaf")
	}
}
