package db

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"mailproxy/config"
)

// EnsurePeerRoles makes the roles that members log in as, and ends the sessions and drops the roles of whoever is none any more.
func (d *DB) EnsurePeerRoles(ctx context.Context) error {
	err := d.write(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT node.ensure_roles()")
		return err
	})
	if err != nil {
		return fmt.Errorf("peer roles: %w", err)
	}
	return nil
}

// Backend opens a session on this node's server for another node, as its own role: the push role where that node owns the highest
// epoch promised here, else the peer role. ErrNotMember for whoever is none. It gives the connection, idle behind its startup, and the
// messages that the server said in it, for the peer's client to read. The caller closes the connection.
func (d *DB) Backend(ctx context.Context, from config.CID) (conn net.Conn, startup []byte, err error) {
	var role string
	if err := d.pool.QueryRow(ctx, "SELECT node.backend_role($1)", from).Scan(&role); err != nil {
		return nil, nil, fmt.Errorf("session for node %d: %w", from, mapError(err))
	}
	c := d.pool.Config().ConnConfig.Config.Copy()
	c.User, c.Password = role, ""
	c.RuntimeParams = map[string]string{"application_name": fmt.Sprintf("node %d", from)}
	if d.rolePassword != nil {
		c.Password = d.rolePassword(role)
		if err := d.setPassword(ctx, role, c.Password); err != nil {
			return nil, nil, fmt.Errorf("session for node %d: %w", from, err)
		}
	}
	pg, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		return nil, nil, fmt.Errorf("session for node %d: %w", from, err)
	}
	h, err := pg.Hijack()
	if err != nil {
		closeConn(pg)
		return nil, nil, fmt.Errorf("session for node %d: %w", from, err)
	}
	if startup, err = startupMessages(h); err != nil {
		h.Conn.Close()
		return nil, nil, fmt.Errorf("session for node %d: %w", from, err)
	}
	return h.Conn, startup, nil
}

// startupMessages says again what the server said at the start, but for its secret key: peers cannot cancel.
func startupMessages(h *pgconn.HijackedConn) ([]byte, error) {
	messages := []pgproto3.BackendMessage{&pgproto3.AuthenticationOk{}}
	for _, name := range slices.Sorted(maps.Keys(h.ParameterStatuses)) {
		messages = append(messages, &pgproto3.ParameterStatus{Name: name, Value: h.ParameterStatuses[name]})
	}
	messages = append(messages, &pgproto3.BackendKeyData{ProcessID: h.PID, SecretKey: make([]byte, 4)},
		&pgproto3.ReadyForQuery{TxStatus: h.TxStatus})
	var b []byte
	var err error
	for _, m := range messages {
		if b, err = m.Encode(b); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (d *DB) setPassword(ctx context.Context, role, password string) error {
	name := pgx.Identifier{role}.Sanitize()
	_, err := d.pool.Exec(ctx, "ALTER ROLE "+name+" PASSWORD '"+strings.ReplaceAll(password, "'", "''")+"'")
	return mapError(err)
}
