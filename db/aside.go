package db

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"
)

// asideNice is by how much what nobody waits for is nicer than the rest.
const asideNice = 10

// readAside is read for what takes long and nobody waits for: the server's process lets those of mail and of changes go first, where it
// is on this host. The connection is not the pool's: a process that has stepped back may not come forward again.
func (d *DB) readAside(ctx context.Context, f func(tx pgx.Tx) error) error {
	conn, err := pgx.ConnectConfig(ctx, d.pool.Config().ConnConfig)
	if err != nil {
		return mapError(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // it was read only
	if strings.HasPrefix(conn.Config().Host, "/") {
		stepBack(int(conn.PgConn().PID()))
	}
	return mapError(pgx.BeginTxFunc(ctx, conn, readOnly, f))
}

// stepBack lowers the priority of a server's process; one that is not there, or not ours to tell, is left as it is.
func stepBack(pid int) {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil || !bytes.HasPrefix(name, []byte("postgres")) { // a socket may lead out of a container
		return
	}
	if raw, err := unix.Getpriority(unix.PRIO_PROCESS, pid); err == nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, pid, 20-raw+asideNice) // what is too nice becomes 19
	}
}
