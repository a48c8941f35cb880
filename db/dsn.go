package db

import (
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// connectTimeout bounds one attempt to reach one server, which is on this host or near.
	connectTimeout = 5 * time.Second
	// maxConns bounds the pool where the DSN says nothing: the daemon's loops and a few commands, never a connection a message, and a
	// connection for each slave that is being pushed to.
	maxConns = 24
	// minConns is what a DSN must allow: a long push holds one, and Listen has one besides the pool.
	minConns = 3
	// keptConns of them are for all that is no push: those may be many and last long, and the lease and commits must not wait for them.
	keptConns = 4
	// silence is how long a server's host may say nothing to what was sent to it, or to keep-alives. The kernel's own bound is 15 minutes.
	silence = 15 * time.Second
)

// poolConfig reads a DSN: one host or several, its pool settings (pool_max_conns, pool_max_conn_lifetime, …), our defaults for the rest.
// The node writes, so of several hosts the one that can be written is taken, whatever target_session_attrs says.
func poolConfig(dsn string) (*pgxpool.Config, error) {
	c, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	given, err := pgx.ParseConfig(dsn) // the pool's settings stand among its RuntimeParams
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	if _, ok := given.RuntimeParams["pool_max_conns"]; !ok {
		c.MaxConns = maxConns
	}
	if c.MaxConns < minConns {
		return nil, fmt.Errorf("database: pool_max_conns is %d, and a node needs at least %d", c.MaxConns, minConns)
	}
	if _, ok := given.RuntimeParams["pool_ping_timeout"]; !ok {
		c.PingTimeout = connectTimeout
	}
	if c.ConnConfig.ConnectTimeout == 0 {
		c.ConnConfig.ConnectTimeout = connectTimeout
	}
	c.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	c.ConnConfig.DialFunc = dialer().DialContext
	// Our plans look dear, and are short: to compile them, or to start a worker for them, takes longer than to run them.
	c.ConnConfig.RuntimeParams["jit"] = "off"
	c.ConnConfig.RuntimeParams["max_parallel_workers_per_gather"] = "0"
	c.ConnConfig.RuntimeParams["application_name"] = "mailproxy"
	return c, nil
}

// pushesOf is how many pushes may be under way by a pool of so many connections.
func pushesOf(conns int32) int { return max(1, int(conns)-keptConns) }

// tcpUserTimeout is TCP_USER_TIMEOUT of linux/tcp.h, which package syscall does not name.
const tcpUserTimeout = 0x12

// dialer notices a host that went away without a word.
func dialer() *net.Dialer {
	return &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: silence / 3, Interval: silence / 3, Count: 2},
		Control: func(network, _ string, c syscall.RawConn) error {
			if network == "unix" {
				return nil
			}
			var err error
			if cerr := c.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(silence.Milliseconds()))
			}); cerr != nil {
				return cerr
			}
			return err
		},
	}
}
