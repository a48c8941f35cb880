package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/filter"
	"mailproxy/internal/version"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/relay"
	"mailproxy/smtpd"
	"mailproxy/tunnel"
	"mailproxy/web"
)

// spoolReserve is what stays free on the spool's disk: mail is answered 452 before PostgreSQL's disk is full.
const spoolReserve = 64 << 20

// A daemon is everything that `serve` runs, in the order in which it is built.
type daemon struct {
	local *config.Local
	doors *listeners
	log   zerolog.Logger

	instance *db.Instance // nil where the database is another's
	db       *db.DB
	tunnel   *tunnel.Tunnel
	node     *cluster.Node
	config   *configuration

	relay *relay.Client
	queue *queue.Queue
	smtpd *smtpd.Server // nil where smtp does not run here
	web   *web.Server
	drain *drainer
	// stopping: the SMTP listeners are being closed.
	stopping atomic.Bool
}

// build makes what needs neither the disk nor the network: the cluster's side, from the database up.
func build(local *config.Local, doors *listeners, log zerolog.Logger) (*daemon, error) {
	d := &daemon{local: local, doors: doors, log: log}
	if local.Database.DSN == "" {
		d.instance = privateInstance(local, log)
	}
	now, err := clock()
	if err != nil {
		return nil, err
	}
	if d.db, err = db.Open(db.Options{DSN: databaseDSN(local), NodeKey: nodeKey(local), Log: log}); err != nil {
		return nil, err
	}
	d.config = newConfiguration(local.SnapshotFile(), d.db, log)
	d.tunnel = tunnel.New(tunnel.Options{
		Listen:  local.Tunnel.Listen,
		KeyDir:  local.KeyDir(),
		PeerDir: local.PeerDir,
		Services: map[string]tunnel.Handler{
			tunnel.ServicePostgres: tunnel.ServePostgres(d.db.Backend),
			tunnel.ServiceControl:  func(ctx context.Context, from config.CID, c net.Conn) { d.web.ServePeer(ctx, from, c) },
		},
		Join: func(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) {
			return d.node.HandleJoin(ctx, r)
		},
		CheckJoin: func(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinCheck, error) {
			return d.node.HandleCheckJoin(ctx, r)
		},
		Log: log,
		Now: now,
	})
	d.node = cluster.New(cluster.Options{
		Local: local, DB: d.db, Tunnel: d.tunnel, Version: version.Version,
		Snapshot: d.config.loaded.Load,
		Problems: d.problems,
		Starting: d.starting,
		Draining: func() *cluster.Draining { return d.drain.status() },
		Kept:     d.kept,
		CheckPassword: func(ctx context.Context, from, password string) error {
			return checkRootPassword(ctx, pamSocket, from, password)
		},
		Log: log,
		Now: now,
	})
	d.config.tunnel, d.config.node, d.config.keyDir = d.tunnel, d.node, local.KeyDir()
	d.config.opened.file, d.config.opened.keyDir = local.SecretsFile(), local.KeyDir()
	return d, nil
}

// privateInstance describes the node's own PostgreSQL.
func privateInstance(l *config.Local, log zerolog.Logger) *db.Instance {
	return db.NewInstance(db.InstanceOptions{
		DataDir: l.PostgresDataDir(), SocketDir: l.PostgresSocketDir(), Bin: l.Database.Bin, User: l.User, Log: log,
	})
}

// databaseDSN says how the daemon, and root's commands, reach the node's database.
func databaseDSN(l *config.Local) string {
	if l.Database.DSN != "" {
		return l.Database.DSN
	}
	return privateInstance(l, zerolog.Nop()).DSN()
}

// nodeKey reads the node's own key, which opens the secrets.
func nodeKey(l *config.Local) func() (ed25519.PrivateKey, error) {
	return func() (ed25519.PrivateKey, error) { return tunnel.PrivateKey(l.KeyDir()) }
}

// open makes the mail path: the configuration of the file, the spool, the certificate.
func (d *daemon) open() error {
	d.config.start()
	d.tunnel.Reload(d.config.loaded.Load()) // peers are reached with PostgreSQL down too, and without the file
	d.relay = relay.New(relay.Options{Hostname: d.local.Name, Secret: d.config.secret, Own: ownAddresses(d.local, d.doors.listening()), Log: d.log})
	var err error
	d.queue, err = queue.Open(queue.Options{
		Dir: d.local.SpoolDir(), Relay: d.relay, Hostname: d.local.Name, MinFree: spoolReserve,
		Route: d.route, Transport: d.transport, Life: d.queueLife, DelayNotice: d.delayNotice, Log: d.log,
	})
	if err != nil {
		return err
	}
	if len(d.doors.smtp) > 0 {
		file, err := fileCertificate(d.local, time.Now())
		if err != nil {
			return err
		}
		d.config.certificates = &certificates{name: d.local.Name, path: tlsFile(d.local), log: d.log}
		d.config.certificates.file.Store(&file)
		d.config.showCertificates()
		d.smtpd = smtpd.New(smtpd.Options{
			Hostname: d.local.Name, Rules: d.config.rules.Load, Relay: d.relay, Queue: d.queue, TLS: d.config.certificates.tlsConfig(),
			TempDir: tempDir(d.local), MinFree: spoolReserve, Log: d.log,
		})
	}
	d.drain = openDrainer(d.local.StateDir, d.smtpd, d.log)
	registry := prometheus.NewRegistry()
	for _, c := range d.collectors() {
		if err := registry.Register(c); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
	}
	d.web = web.New(web.Options{
		Node: d.local.Name, Version: version.Version, Checks: d.checks(), Queue: d.queue,
		Status:   func(ctx context.Context, verify bool) any { return d.node.Self(ctx, verify) },
		Command:  d.runCommand,
		Hops:     func() any { return d.relay.Hops() },
		Drain:    web.Drain{Begin: d.drain.Begin, End: d.drain.End, On: d.takesNone},
		Weight:   d.weight,
		Master:   d.node.Master,
		Peer:     d.peerSocket,
		Member:   d.node.ServeMember,
		Gatherer: registry, Log: d.log,
	})
	return nil
}

// close lets go of what build and open took; the parts must have ended.
func (d *daemon) close() {
	if d.queue != nil {
		_ = d.queue.Close()
	}
	if d.relay != nil {
		d.relay.Close()
	}
	d.db.Close()
}

// tempDir holds the bodies of messages that are being taken, in files without a name.
func tempDir(l *config.Local) string { return filepath.Join(l.StateDir, "tmp") }

// route gives the way out by the configuration of this moment, for what is queued.
func (d *daemon) route(to mail.Path) (config.Transport, *mail.Reply) {
	rules := d.config.rules.Load()
	if rules == nil {
		return config.Transport{}, &mail.Reply{Code: 451, Enhanced: [3]int{4, 3, 2}, Text: "no configuration yet"}
	}
	return rules.Route(to)
}

// transport gives the one that an operator has named for an item.
func (d *daemon) transport(name string) (config.Transport, bool) {
	rules := d.config.rules.Load()
	if rules == nil {
		return config.Transport{}, false
	}
	return rules.Transport(name)
}

// peerSocket leads to another member.
func (d *daemon) peerSocket(cid config.CID) (string, bool) {
	s := d.config.loaded.Load()
	if s == nil || !slices.ContainsFunc(s.Nodes, func(n config.Node) bool { return n.CID == cid }) {
		return "", false
	}
	if id, err := tunnel.LoadIdentity(d.local.KeyDir()); err != nil || id.CID == cid {
		return "", false
	}
	return d.local.PeerControlSocket(cid), true
}

func (d *daemon) queueLife() time.Duration { return d.settings().QueueLife }

func (d *daemon) delayNotice() time.Duration { return d.settings().DelayNotice }

func (d *daemon) settings() config.Values {
	rules := d.config.rules.Load()
	if rules == nil {
		rules, _ = filter.Compile(&config.Snapshot{}) // the defaults
	}
	return rules.Settings()
}

// parts are what runs, from the bottom up. They are stopped from the top down, each when the one above has ended:
//
//	smtp           first no new mail; then the sessions are drained, which need all that is below: what they still bring
//	               is relayed, or queued
//	queue          when no session can queue any more; attempts under way end, which need the configuration's routes
//	relay          when neither sessions nor the queue use its connections; those that are kept are closed
//	configuration  nobody routes by it now; saves the file for the next start
//	cluster        before the tunnel and the database, which its pushes use: a push that is cut is rolled back, but needlessly
//	tunnel         when neither pushes nor probes want it
//	web            last of what answers: status and health tell, up to here, that the node is stopping
//	postgres       at the very end: everything above has its connections
//
// The bounds together are below the unit's TimeoutStopSec.
func (d *daemon) parts() []part {
	const short = 5 * time.Second
	var all []part
	if d.instance != nil {
		all = append(all, part{"postgres", func(ctx context.Context) error { return d.instance.Run(ctx, func(string) { d.config.wake() }) }, 32 * time.Second})
	}
	all = append(all,
		part{"web", d.serveWeb, short},
		part{"tunnel", d.tunnel.Run, short},
		part{"cluster", d.node.Run, short},
		part{"configuration", d.config.Run, short},
		part{"relay", d.relay.Run, short},
		part{"queue", d.runQueue, short},
	)
	if d.smtpd != nil {
		all = append(all, part{"smtp", d.serveSMTP, drainBound + short})
	}
	return all
}

// drainBound is how long open sessions have to end.
const drainBound = 30 * time.Second

// takesNone says whether no new sessions are wanted: the node is drained, or about to stop.
func (d *daemon) takesNone() bool { return d.drain.On() || d.stopping.Load() }

func (d *daemon) serveSMTP(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { d.stopping.Store(true) })() // balancers hear of it while sessions end
	g, serveCtx := errgroup.WithContext(ctx)
	for _, l := range d.doors.smtp {
		g.Go(func() error { return d.smtpd.Serve(serveCtx, l, l.kind) })
	}
	err := g.Wait() // nobody is accepted any more; the sessions go on
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainBound)
	defer cancel()
	if d.smtpd.Drain(bound) != nil {
		d.log.Warn().Int64("bound_ms", drainBound.Milliseconds()).Msg("drain.cut")
	}
	return err
}

// runQueue makes attempts once it is known where mail goes: an attempt without that would only put it off, or fail for good.
func (d *daemon) runQueue(ctx context.Context) error {
	d.config.await(ctx)
	return d.queue.Run(ctx)
}

func (d *daemon) serveWeb(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.web.Run(ctx) })
	g.Go(func() error { return d.web.ServeControl(ctx, d.doors.control) })
	for _, l := range d.doors.web {
		g.Go(func() error { return d.web.ServePublic(ctx, l) })
	}
	for _, l := range d.doors.agent {
		g.Go(func() error { return d.web.ServeAgent(ctx, l) })
	}
	return g.Wait()
}

// checks are what /health runs. Without a database mail flows all the same, so that is not critical: a balancer must not take
// the node out for it.
func (d *daemon) checks() []web.Check {
	all := []web.Check{
		{Name: "configuration", Func: func(context.Context) error { return d.config.refusal() }},
		{Name: "database", Func: d.checkDatabase},
		{Name: "spool", Critical: true, Func: func(context.Context) error { return d.queue.Healthy() }},
		{Name: "damaged", Func: func(context.Context) error { return d.queue.Whole() }},
	}
	if d.smtpd != nil {
		all = append(all, web.Check{Name: "smtp", Critical: true, Func: d.config.checkRules})
	}
	return all
}

func (d *daemon) checkDatabase(ctx context.Context) error {
	if d.instance != nil {
		if p := d.instance.Problem(); p != "" {
			return errors.New(p)
		}
	}
	return d.config.checkDatabase(ctx)
}

// starting says whether the database is being made ready for the first time, and not in vain.
func (d *daemon) starting() bool {
	switch {
	case d.config.migrated.Load():
		return false
	case d.instance != nil:
		return !d.instance.Failing()
	}
	return d.config.untried()
}

// problems are what the daemon knows to be wrong, for status.
func (d *daemon) problems() []cluster.Problem {
	all := d.config.problems()
	if d.instance != nil {
		if p := d.instance.Problem(); p != "" {
			all = append(all, cluster.Problem{What: p, Remedy: `mail goes on meanwhile; "journalctl -u mailproxy" shows more`})
		}
	}
	if d.smtpd != nil {
		if a := d.smtpd.Headless(time.Now()); a.IsValid() {
			all = append(all, cluster.Problem{What: fmt.Sprintf("connections from %s were refused in the last 5 minutes: the setting proxy_from has it, and they begin without a PROXY header", a),
				Remedy: "have the balancer send one, as `mailproxy lb haproxy` and `mailproxy lb nginx` print it; or take it out of proxy_from"})
		}
	}
	if d.queue != nil {
		all = append(all, spoolProblems(d.queue.Healthy(), d.queue.Whole(), d.local.SpoolDir())...)
		if n := d.queue.Stats().OnHold; n > 0 {
			all = append(all, cluster.Problem{What: count(n, "queued item") + " on hold, by an operator's order",
				Remedy: "`mailproxy queue list --on-hold` there shows since when and by whom; `mailproxy queue release ALL` ends it"})
		}
	}
	return all
}

// kept counts the items that are kept, for status.
func (d *daemon) kept() int {
	if d.queue == nil {
		return 0
	}
	return d.queue.Stats().Kept
}

// spoolProblems are what is wrong with the spool, each with its remedy.
func spoolProblems(sick, damaged error, dir string) (all []cluster.Problem) {
	switch {
	case errors.Is(sick, queue.ErrFull):
		all = append(all, cluster.Problem{What: "spool: " + sick.Error(), Remedy: "make room on the disk of " + dir})
	case sick != nil:
		all = append(all, cluster.Problem{What: "spool: " + sick.Error() + "; no mail is queued here",
			Remedy: "`dmesg` shows what the disk says; `pmgcm drain` takes the node out until it is replaced"})
	}
	if damaged != nil {
		all = append(all, cluster.Problem{What: "spool: " + damaged.Error(),
			Remedy: "`mailproxy spool check` shows them; move them out of " + dir + "/damaged when you have seen to them"})
	}
	return all
}
