package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// joinUser is the SSH user name of a node that wants to join; members come as cid-<n>.
const joinUser = "join"

// What authentication leaves for the session, in ssh.Permissions.ExtraData.
type (
	admitted struct{}
	who      struct {
		cid  config.CID // 0: wants to join
		key  string     // marshalled
		text string     // authorized_keys form
	}
)

// listen accepts connections, which come by that kind of carrier, until the listener is closed.
func (t *Tunnel) listen(ctx context.Context, l net.Listener, by config.TunnelKind) {
	stop := context.AfterFunc(ctx, func() { l.Close() }) // closed twice at worst
	defer stop()
	for ctx.Err() == nil {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, most likely: it passes.
			t.complain(fmt.Errorf("accept: %w", err))
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		host := hostOf(c.RemoteAddr())
		if !t.stranger.take(host) {
			t.refused(c.RemoteAddr(), 0, "too many connections before authentication")
			c.Close() // nothing was sent
			continue
		}
		if !t.owned.spawn(func() { t.greet(ctx, c, host, by) }) {
			c.Close() // nothing was sent
			t.stranger.give(host)
		}
	}
}

// greet authenticates one connection and starts its session, or serves its join.
func (t *Tunnel) greet(ctx context.Context, raw net.Conn, host string, carried config.TunnelKind) {
	released := false
	release := func() {
		if !released {
			released = true
			t.stranger.give(host)
		}
	}
	defer release()
	stop := context.AfterFunc(ctx, func() { raw.Close() }) // closed twice at worst
	defer stop()
	t.mu.Lock()
	tr := t.trust
	t.mu.Unlock()
	w := newWire(raw, t.timing.dead)
	raw.SetDeadline(time.Now().Add(t.timing.handshake)) //nolint:errcheck // a closed conn fails in the handshake
	c, channels, requests, err := ssh.NewServerConn(w, t.serverConfig(tr, carried))
	if err != nil {
		t.refused(raw.RemoteAddr(), 0, refusal(err))
		return
	}
	// The stranger has a name now; a join keeps its slot.
	by := c.Permissions.ExtraData[admitted{}].(who)
	if by.cid == 0 {
		raw.SetDeadline(time.Now().Add(t.timing.join + t.timing.linger)) //nolint:errcheck // a closed conn ends the exchange
		t.serveJoin(ctx, c, by, channels, requests)
		return
	}
	release()
	raw.SetDeadline(time.Time{}) //nolint:errcheck // a closed conn ends the session
	err = t.start(&session{
		cid: by.cid, self: tr.id.CID, cluster: tr.id.ClusterID, key: by.key, dialler: by.cid, carried: carried, use: useOf(c.ClientVersion()), ssh: c, wire: w,
		instance: instanceOf(c.ClientVersion()),
	}, channels, requests)
	if err != nil {
		t.refused(raw.RemoteAddr(), by.cid, err.Error())
	}
}

// serverConfig lets members in by certificate, and joining nodes by the bare key that they will be known by. By WireGuard only the
// member comes that the address inside belongs to.
func (t *Tunnel) serverConfig(tr *trust, carried config.TunnelKind) *ssh.ServerConfig {
	c := &ssh.ServerConfig{
		Config: algorithms(), ServerVersion: t.announced(useAll), MaxAuthTries: maxAuthTries,
		PublicKeyAuthAlgorithms: []string{ssh.KeyAlgoED25519},
		PublicKeyCallback: func(conn ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			by, err := t.authenticate(tr, conn.User(), key)
			if err == nil && carried == config.TunnelWireGuard && by.cid != wgMember(conn.RemoteAddr()) {
				err = errOtherKey
			}
			if err != nil {
				return nil, err
			}
			return &ssh.Permissions{ExtraData: map[any]any{admitted{}: by}}, nil
		},
	}
	c.VerifiedPublicKeyCallback = func(conn ssh.ConnMetadata, _ ssh.PublicKey, p *ssh.Permissions, _ string) (*ssh.Permissions, error) {
		return p, t.refuseGhost(conn, p.ExtraData[admitted{}].(who))
	}
	c.AddHostKey(tr.key.signer)
	if tr.host != nil {
		c.AddHostKey(tr.host)
	}
	return c
}

func (t *Tunnel) authenticate(tr *trust, user string, key ssh.PublicKey) (who, error) {
	if user == joinUser && t.o.Join != nil {
		if key.Type() != ssh.KeyAlgoED25519 {
			return who{}, errNoCertificate
		}
		return who{key: string(key.Marshal()), text: publicText(key)}, nil
	}
	cid, ok := parseCIDPrincipal(user)
	if !ok || !tr.member() {
		return who{}, errNotMember
	}
	if err := tr.check(key, ssh.UserCert, cid); err != nil {
		return who{}, err
	}
	bare := key.(*ssh.Certificate).Key
	return who{cid: cid, key: string(bare.Marshal()), text: publicText(bare)}, nil
}

// refusal is the reason for the log: our own where authentication failed, the library's where it did not come so far.
func refusal(err error) string {
	var auth *ssh.ServerAuthError
	if !errors.As(err, &auth) {
		return cleaned(err.Error(), 200)
	}
	for _, e := range auth.Errors {
		for _, ours := range []error{
			errNoCertificate, errCertKind, errAuthority, errCluster, errPrincipal, errRevoked, errNotMember, errOtherKey, errNotValid, errGhost,
		} {
			if errors.Is(e, ours) {
				return ours.Error()
			}
		}
	}
	return "not authenticated"
}
