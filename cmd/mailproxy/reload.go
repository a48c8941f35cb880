package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/filter"
	"mailproxy/tunnel"
)

const (
	// reloadPoll stands behind the wake-ups of the database.
	reloadPoll = 30 * time.Second
	// saveDelay is how long the file may be behind what is in force: many changes make one file. Where that is large it is longer, so that
	// writing takes no more than a part in saveShare of the time.
	saveDelay = time.Second
	saveShare = 20
	// loadTimeout bounds one reading of the whole configuration.
	loadTimeout = 30 * time.Second
	// retryFirst and retryMost bound the pause before the database is tried again.
	retryFirst = 200 * time.Millisecond
	retryMost  = 5 * time.Second
	// fileGrace is how long the file's configuration is held back from the queue: it may be older than what was in force when the
	// daemon was killed, and not know a domain whose mail is queued.
	fileGrace = 5 * time.Second
)

// A configuration is what is in force here. Its walk:
//
//  1. start compiles the snapshot of the file: mail flows by it at once, with PostgreSQL down;
//  2. Run migrates the database, and loads the configuration at each wake-up: what compiles is swapped in, and saved to the file
//     a little later; what does not is refused, the old one stays in force, and problem says so.
type configuration struct {
	file   string
	keyDir string
	db     *db.DB
	tunnel *tunnel.Tunnel
	node   *cluster.Node
	log    zerolog.Logger

	// rules is what mail is taken by; nil until there is a configuration.
	rules atomic.Pointer[filter.Ruleset]
	// loaded is the newest snapshot that was read, also where it did not compile: members must not hang on that.
	loaded atomic.Pointer[config.Snapshot]

	migrated atomic.Bool // the database has our schema

	settled chan struct{} // closed when rules are those of the database, for the first time
	settle  sync.Once
	dirty   chan struct{} // capacity 1: read the configuration again
	unsaved chan struct{} // capacity 1: the file is behind

	mu sync.Mutex // guards the rest
	// good is the snapshot that rules were made from.
	good *config.Snapshot
	// refused is why the newest snapshot is not in force; nil where it is.
	refused error
	// databaseErr is why the configuration cannot be read; nil where it can.
	databaseErr error
	// unreadable are the secrets that this node cannot open, and unreadableErr is why not the first.
	unreadable    []string
	unreadableErr error
	opened        opened

	// certificates shows those of the configuration that is in force; nil where no mail is taken here.
	certificates *certificates
}

func newConfiguration(file string, d *db.DB, log zerolog.Logger) *configuration {
	return &configuration{file: file, db: d, log: log, settled: make(chan struct{}),
		dirty: make(chan struct{}, 1), unsaved: make(chan struct{}, 1),
		databaseErr: errUntried}
}

// start takes what the file has. A node without one, or with one that is damaged, answers 451 until the database is there.
func (c *configuration) start() {
	if err := c.opened.start(); err != nil {
		c.log.Error().Err(err).Str("file", c.opened.file).Msg("secret.unreadable")
	}
	s, err := config.LoadSnapshot(c.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err != nil:
		c.log.Error().Err(err).Str("file", c.file).Msg("config.unreadable")
		return
	}
	c.loaded.Store(s)
	rules, err := compile(nil, s)
	if err != nil {
		c.refuse(s, err)
		return
	}
	c.rules.Store(rules)
	c.mu.Lock()
	c.good = s
	c.mu.Unlock()
	c.logLoaded(s, "file")
}

// compile makes rules of a snapshot, and passes over what it shares with one that is known to compile; nil where none is.
func compile(sound, s *config.Snapshot) (*filter.Ruleset, error) {
	if err := config.ValidateAfter(sound, s); err != nil {
		return nil, err
	}
	return filter.Compile(s)
}

// inForce is the snapshot that mail is taken by; nil where there is none yet.
func (c *configuration) inForce() *config.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.good
}

// wake asks for the configuration to be read again. It never blocks.
func (c *configuration) wake() {
	c.node.Changed() // pushing need not wait for us
	select {
	case c.dirty <- struct{}{}:
	default:
	}
}

// Run keeps what is in force up to date until ctx ends.
func (c *configuration) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	if c.certificates != nil {
		wg.Go(func() { c.certificates.follow(ctx) })
	}
	if !c.migrate(ctx) {
		return nil
	}
	c.migrated.Store(true)
	wg.Go(func() {
		runtime.LockOSThread() // it ends with this goroutine
		// Taking mail and changes goes before; where that cannot be had it goes beside.
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), saveNice)
		c.saver(ctx)
	})
	wg.Go(func() {
		if err := c.db.Listen(ctx, c.wake); err != nil && ctx.Err() == nil {
			c.log.Error().Err(err).Msg("config.deaf") // the poll goes on
		}
	})
	poll := time.NewTicker(reloadPoll)
	defer poll.Stop()
	for {
		c.reload(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-c.dirty:
		case <-poll.C:
		}
	}
}

// migrate brings the schema up to date, however long the database takes to be there; false when ctx ended first.
func (c *configuration) migrate(ctx context.Context) bool {
	pause := retryFirst
	for {
		err := c.db.Migrate(ctx)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			return true
		}
		if !c.setDatabaseErr(err) {
			c.log.Warn().Err(err).Msg("db.away")
		}
		timer := time.NewTimer(pause + rand.N(pause/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
		case <-c.dirty: // PostgreSQL answers
			timer.Stop()
		}
		pause = min(2*pause, retryMost)
	}
}

var errUntried = errors.New("not read yet")

// untried says whether the database has neither answered nor failed yet.
func (c *configuration) untried() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Is(c.databaseErr, errUntried)
}

// setDatabaseErr notes how the database is, and says whether that was so before.
func (c *configuration) setDatabaseErr(err error) (same bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.databaseErr
	c.databaseErr = err
	return (before == nil) == (err == nil) && (err == nil || before.Error() == err.Error())
}

// await waits until mail can be routed: by what the database says, or, where that is long in coming, by the file.
func (c *configuration) await(ctx context.Context) {
	grace := time.NewTimer(fileGrace)
	defer grace.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.settled:
			return
		case <-grace.C:
			if c.rules.Load() != nil {
				return
			}
			grace.Reset(fileGrace)
		}
	}
}

// reload reads the configuration and puts it in force.
func (c *configuration) reload(ctx context.Context) {
	c.reread(ctx)
	c.mu.Lock()
	read := c.databaseErr == nil
	c.mu.Unlock()
	if read && c.rules.Load() != nil {
		c.settle.Do(func() { close(c.settled) })
	}
	if read {
		c.trySecrets(ctx)
	}
}

// trySecrets looks whether this node can open its secrets, so that status can say so before one is needed.
func (c *configuration) trySecrets(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	rows, err := c.db.Secrets(ctx)
	if err != nil {
		return // the next reading of the configuration says more
	}
	var names []string
	var first error
	for _, r := range rows {
		if r.Err != nil {
			names, first = append(names, r.Name), cmp.Or(first, r.Err)
		}
	}
	c.mu.Lock()
	if len(names) > 0 && !slices.Equal(names, c.unreadable) {
		c.log.Error().Strs("names", names).Err(first).Msg("secret.unreadable")
	}
	c.unreadable, c.unreadableErr = names, first
	c.mu.Unlock()
	if s := c.loaded.Load(); s != nil {
		c.openSecrets(ctx, s)
	}
	c.showCertificates()
}

// showCertificates lets TLS show the certificates that are in force.
func (c *configuration) showCertificates() {
	if s := c.inForce(); c.certificates != nil && s != nil {
		c.certificates.use(s.Certificates, c.secret)
	}
}

func (c *configuration) reread(ctx context.Context) {
	loadCtx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	s, err := c.db.Load(loadCtx)
	if ctx.Err() != nil {
		return
	}
	same := c.setDatabaseErr(err)
	if err != nil {
		if !same {
			c.log.Warn().Err(err).Msg("db.away")
		}
		return
	}
	if c.emptied(s) || c.node.TakenBack(loadCtx, s) {
		return
	}
	before := c.loaded.Swap(s)
	c.tunnel.Reload(s) // always: the identity beside the snapshot may have changed
	c.node.Wake()
	if before != nil && before.Position == s.Position && before.ClusterID == s.ClusterID && c.tried() {
		return
	}
	if s.ClusterID != "" && len(s.Nodes) == 0 {
		// Entered a cluster whose configuration has not come yet: what there was is void, and nobody may be refused for good.
		c.rules.Store(nil)
		return
	}
	start := time.Now()
	rules, err := compile(c.inForce(), s)
	if err != nil {
		c.refuse(s, err)
		return
	}
	c.rules.Store(rules)
	c.mu.Lock()
	c.good, c.refused = s, nil
	c.mu.Unlock()
	c.log.Debug().Int64("took_ms", time.Since(start).Milliseconds()).Msg("config.compiled")
	c.logLoaded(s, "database")
	select {
	case c.unsaved <- struct{}{}:
	default:
	}
}

// errEmptied is a database that was made anew on a member: by its empty configuration all mail would be refused for good.
var errEmptied = errors.New("the database is of no cluster, and this node was in one")

// left says whether this node has left its cluster by its operator's wish, which takes the identity away before the rows.
func (c *configuration) left() bool {
	_, err := tunnel.LoadIdentity(c.keyDir)
	return errors.Is(err, fs.ErrNotExist)
}

// emptied says whether the snapshot is of such a database; then what there was stays in force, until the node has joined again.
func (c *configuration) emptied(s *config.Snapshot) bool {
	was := c.loaded.Load()
	empty := was != nil && was.ClusterID != "" && s.ClusterID == "" && !c.left()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch known := errors.Is(c.refused, errEmptied); {
	case empty && !known:
		c.refused = errEmptied
		c.log.Error().Err(errEmptied).Msg("config.refused")
	case known && !empty:
		c.refused = nil
	}
	return empty
}

// tried says whether the newest snapshot is in force, or refused.
func (c *configuration) tried() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused != nil || c.rules.Load() != nil
}

// maxRefusals is how many of the things that are wrong with a configuration status, health and log name: in rows that were written by
// hand there may be more than anybody reads, or than an answer may hold.
const maxRefusals = 20

// fewer gives an error of at most so many lines, which says how many others there are.
func fewer(err error, most int) error {
	lines := strings.Split(err.Error(), "\n")
	if len(lines) <= most {
		return err
	}
	return fmt.Errorf("%s\nand %d more", strings.Join(lines[:most], "\n"), len(lines)-most)
}

func (c *configuration) refuse(s *config.Snapshot, err error) {
	err = fewer(err, maxRefusals)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused = fmt.Errorf("configuration %v does not compile: %w", s.Position, err)
	c.log.Error().Err(err).Stringer("epoch", s.Position.Epoch).Int64("serial", s.Position.Serial).Msg("config.refused")
}

func (c *configuration) logLoaded(s *config.Snapshot, from string) {
	c.log.Info().Stringer("epoch", s.Position.Epoch).Int64("serial", s.Position.Serial).Stringer("digest", s.Position.Digest).
		Str("from", from).Int("domains", s.Domains.Len()).Msg("config.loaded")
}

// saveNice is the priority at which the file is written, of 0 to 19, which is the least.
const saveNice = 10

// saver keeps the file a little behind what is in force, and up to date at the end.
func (c *configuration) saver(ctx context.Context) {
	wait := saveDelay
	for {
		select {
		case <-ctx.Done():
			select {
			case <-c.unsaved:
				c.save()
			default:
			}
			return
		case <-c.unsaved:
		}
		if _, err := os.Stat(c.file); err == nil { // the first file is made at once: without one no mail is taken
			delay := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				delay.Stop()
			case <-delay.C:
			}
		}
		began := time.Now()
		c.save()
		wait = max(saveDelay, saveShare*time.Since(began))
	}
}

func (c *configuration) save() {
	if err := c.inForce().Save(c.file); err != nil {
		c.log.Error().Err(err).Msg("config.unsaved")
	}
}

// problems says what is wrong with the configuration, and what to do.
func (c *configuration) problems() []cluster.Problem {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []cluster.Problem
	switch {
	case errors.Is(c.refused, errEmptied):
		all = append(all, cluster.Problem{What: c.refused.Error() + "; the configuration from before stays in force",
			Remedy: "run what `pmgcm join-cmd` on the master prints; or, to go on as a single node, stop the daemon, remove " + c.file + " and start it"})
	case c.refused != nil:
		all = append(all, cluster.Problem{What: c.refused.Error() + "; the one before stays in force",
			Remedy: `on the master: "mailproxy config show", then correct it with "mailproxy config apply"`})
	}
	if len(c.unreadable) > 0 {
		p := cluster.Problem{What: fmt.Sprintf("this node cannot open %s: %v", countSecrets(c.unreadable), c.unreadableErr),
			Remedy: "`mailproxy secret set NAME` again for each"}
		if errors.Is(c.unreadableErr, db.ErrNoDataKey) {
			p.Remedy = "put keys/node.key back from a backup and restart the daemon; on a slave, `pmgcm delete` this node on the master and join again; " +
				"where no node opens them, `mailproxy secret remove NAME` and `mailproxy secret set NAME` for each"
		}
		all = append(all, p)
	}
	if c.certificates != nil {
		all = append(all, c.certificates.problems(time.Now())...)
	}
	return append(all, c.missingLocked()...)
}

// countSecrets is "the secret dkim", or "2 secrets, dkim the first".
func countSecrets(names []string) string {
	if len(names) == 1 {
		return "the secret " + names[0]
	}
	return fmt.Sprintf("%d secrets, %s the first", len(names), names[0])
}

// refusal says why the newest configuration is not in force; nil where it is.
func (c *configuration) refusal() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused
}

// checkRules is the health check of what mail is taken by.
func (c *configuration) checkRules(context.Context) error {
	if c.rules.Load() == nil {
		return errors.New("there is no configuration yet")
	}
	return nil
}

// checkDatabase is the health check of the database: whether the configuration could be read.
func (c *configuration) checkDatabase(ctx context.Context) error {
	if err := c.db.Ping(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.databaseErr
}
