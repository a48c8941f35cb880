package tunnel

import (
	"context"
	"net"

	"mailproxy/config"
)

// A carrier is what SSH runs over: it makes byte streams to the tunnel of another node. Who is at the other end, SSH proves.
type carrier interface {
	// dial connects to the tunnel of the member cid, which is at address (host:port).
	dial(ctx context.Context, cid config.CID, address string) (net.Conn, error)
}

// carrier gives the one of a kind.
func (t *Tunnel) carrier(kind config.TunnelKind) carrier {
	if kind == config.TunnelWireGuard {
		return t.wireguard
	}
	return tcp{net.Dialer{KeepAlive: t.timing.dead}}
}

// tcp is the carrier that adds nothing.
type tcp struct{ dialer net.Dialer }

func (c tcp) dial(ctx context.Context, _ config.CID, address string) (net.Conn, error) {
	return c.dialer.DialContext(ctx, "tcp", address)
}
