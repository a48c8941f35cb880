package config

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"mailproxy/mail"
)

// Values are the settings with their types: the defaults, overlaid by the rows of config.setting.
type Values struct {
	// MaxMessageSize bounds one message in octets, as SIZE announces it; a message of exactly that size is taken.
	MaxMessageSize int64
	// MaxHeaderSize bounds a message's header in octets.
	MaxHeaderSize int64
	// MaxLineLength bounds one line of a message in octets, without its CRLF.
	MaxLineLength int
	// MaxRecipients bounds the forward-paths of one transaction.
	MaxRecipients int
	// Limits are for clients from the Internet.
	Limits
	// Internal are the limits for our own networks: their clients on a listener that takes mail from them.
	Internal Limits
	// MaxUnknown is how many refused recipients a session from the Internet may have before it is told nothing more; 0: no limit.
	MaxUnknown int
	// MaxUnknownPerHour is the same over all sessions of a client; 0: no limit.
	MaxUnknownPerHour int
	// MinRate is how fast a message must come on the average, in octets a second, beyond the idle time-out.
	MinRate int
	// MaxErrors is how many refused commands a session may have before it is ended.
	MaxErrors int
	// IdleTimeout ends a session in which the client sent nothing for so long.
	IdleTimeout time.Duration
	// SessionTimeout ends a session that is older.
	SessionTimeout time.Duration
	// QueueLife is how long an item is tried before a DSN says that it could not be delivered.
	QueueLife time.Duration
	// DelayNotice is after how long a DSN says that an item is late; 0 is never.
	DelayNotice time.Duration
	// OutboundTransport is the transport for mail that goes to none of our domains; empty: MX records.
	OutboundTransport string
	// Postmaster gets mail for a bare postmaster; the null Path: postmaster at the first domain.
	Postmaster mail.Path
	// CutThrough tries the next hop inside the client's transaction; otherwise all mail is queued.
	CutThrough bool
	// RefuseBareNewlines ends a session whose message has a bare CR or LF; otherwise these are made CRLF.
	RefuseBareNewlines bool
	// InternalRequireTLS takes mail from our networks by TLS only.
	InternalRequireTLS bool
	// ProxyFrom are the balancers that say in front of each session, by the PROXY protocol, who the client is; nobody else may.
	ProxyFrom []netip.Prefix
	// XclientFrom are the hosts that may say by XCLIENT who their client is.
	XclientFrom []netip.Prefix
	// Tunnel is what carries the connections between nodes.
	Tunnel TunnelKind
	// JoinPassword lets a node join by root's password on the master.
	JoinPassword bool
}

// Limits bound what the clients of one side may take of a node. A client is an IPv4 address, or one /64 of IPv6.
type Limits struct {
	// MaxSessions bounds the SMTP sessions of one node.
	MaxSessions int
	// MaxSessionsPerAddress bounds the SMTP sessions from one client.
	MaxSessionsPerAddress int
	// MaxSessionsPerNetwork bounds the SMTP sessions from one /24 of IPv4, or /64 of IPv6.
	MaxSessionsPerNetwork int
	// MaxConnectionsPerMinute bounds how often a client connects; 0: no limit, as with the next two.
	MaxConnectionsPerMinute int
	// MaxMessagesPerMinute bounds the transactions of a client.
	MaxMessagesPerMinute int
	// MaxRecipientsPerMinute bounds the recipients of a client.
	MaxRecipientsPerMinute int
}

// limitSettings are the settings of one side's Limits.
func limitSettings(prefix, from string, of func(*Values) *Limits, perAddress, perNetwork, connections string) []setting {
	const most = 10_000_000 // a minute
	return []setting{
		{SettingInfo{prefix + "max_sessions", "2000", "most SMTP sessions of one node, from " + from},
			count(func(v *Values) *int { return &of(v).MaxSessions }, 1, 100_000)},
		{SettingInfo{prefix + "max_sessions_per_address", perAddress, "most SMTP sessions from one client address, or one /64 of IPv6, from " + from},
			count(func(v *Values) *int { return &of(v).MaxSessionsPerAddress }, 1, 100_000)},
		{SettingInfo{prefix + "max_sessions_per_network", perNetwork, "most SMTP sessions from one /24 of IPv4, or one /64 of IPv6, from " + from},
			count(func(v *Values) *int { return &of(v).MaxSessionsPerNetwork }, 1, 100_000)},
		{SettingInfo{prefix + "max_connections_per_minute", connections, "most connections of one client a minute, from " + from + "; 0: no limit"},
			count(func(v *Values) *int { return &of(v).MaxConnectionsPerMinute }, 0, most)},
		{SettingInfo{prefix + "max_messages_per_minute", "0", "most messages of one client a minute, from " + from + "; 0: no limit"},
			count(func(v *Values) *int { return &of(v).MaxMessagesPerMinute }, 0, most)},
		{SettingInfo{prefix + "max_recipients_per_minute", "0", "most recipients of one client a minute, from " + from + "; 0: no limit"},
			count(func(v *Values) *int { return &of(v).MaxRecipientsPerMinute }, 0, most)},
	}
}

// TunnelKind is what carries the SSH connections between nodes.
type TunnelKind string

// The kinds of tunnel: plain TCP, or WireGuard around it.
const (
	TunnelSSH       TunnelKind = "ssh"
	TunnelWireGuard TunnelKind = "wireguard"
)

// Tunnel gives the setting of that name; TunnelSSH where it is not set or is none that this version knows.
func (s *Snapshot) Tunnel() TunnelKind {
	for _, row := range s.Settings {
		if row.Name == "tunnel" && row.Value == string(TunnelWireGuard) {
			return TunnelWireGuard
		}
	}
	return TunnelSSH
}

// SettingInfo describes one setting for people.
type SettingInfo struct {
	// Name is in lower case with underscores.
	Name string `json:"name"`
	// Default is the value where none is set, as text.
	Default string `json:"default"`
	// Help is one sentence: lower case, no period.
	Help string `json:"help"`
}

// A setting is a row of the table below: its description, and how its text becomes part of Values.
type setting struct {
	SettingInfo
	set func(v *Values, text string) error
}

// settingTable lists every setting there is, by name.
func settingTable() []setting {
	const maxLine = 1 << 20
	table := []setting{
		{SettingInfo{"max_message_size", "50MB", "largest message that is taken"},
			size(func(v *Values) *int64 { return &v.MaxMessageSize }, 64<<10, 2<<30)}, // RFC 5321 §4.5.3.1.7: at least 64K
		{SettingInfo{"max_header_size", "1MB", "largest header of a message"},
			size(func(v *Values) *int64 { return &v.MaxHeaderSize }, 16<<10, 64<<20)},
		{SettingInfo{"max_line_length", "102400", "longest line of a message, in octets"},
			count(func(v *Values) *int { return &v.MaxLineLength }, 998, maxLine)}, // RFC 5321 §4.5.3.1.6: at least 1000 with CRLF
		{SettingInfo{"max_recipients", "1000", "most recipients of one message"},
			count(func(v *Values) *int { return &v.MaxRecipients }, 100, 100_000)}, // RFC 5321 §4.5.3.1.8: at least 100
		{SettingInfo{"max_unknown_recipients", "10", "refused recipients after which a session from the Internet is told nothing more; 0: no limit"},
			count(func(v *Values) *int { return &v.MaxUnknown }, 0, 100_000)},
		{SettingInfo{"max_unknown_recipients_per_hour", "300", "refused recipients of one client an hour, from the Internet; 0: no limit"},
			count(func(v *Values) *int { return &v.MaxUnknownPerHour }, 0, 1_000_000)},
		{SettingInfo{"min_rate", "500", "octets a second that a message must come at on the average"},
			count(func(v *Values) *int { return &v.MinRate }, 1, 1<<20)},
		{SettingInfo{"max_errors", "20", "refused commands after which a session is ended"},
			count(func(v *Values) *int { return &v.MaxErrors }, 1, 10_000)},
		{SettingInfo{"idle_timeout", "5m", "how long a client may be silent"}, // RFC 5321 §4.5.3.2.7: at least 5 minutes
			duration(func(v *Values) *time.Duration { return &v.IdleTimeout }, time.Second, time.Hour)},
		{SettingInfo{"session_timeout", "2h", "how long a session may last"},
			duration(func(v *Values) *time.Duration { return &v.SessionTimeout }, time.Minute, day)},
		{SettingInfo{"queue_life", "5d", "how long queued mail is tried"}, // RFC 5321 §4.5.4.1: at least 4-5 days
			duration(func(v *Values) *time.Duration { return &v.QueueLife }, time.Minute, 30*day)},
		{SettingInfo{"delay_notice", "4h", "after how long the sender of queued mail is told that it is late; 0s: never"},
			duration(func(v *Values) *time.Duration { return &v.DelayNotice }, 0, 30*day)},
		{SettingInfo{"outbound_transport", "", "transport for mail to domains that are not ours; empty: their MX records"},
			setTransportName},
		{SettingInfo{"postmaster", "", "who gets mail for <postmaster>; empty: postmaster at the first domain"}, setPostmaster},
		{SettingInfo{"cut_through", "yes", "deliver while the client waits, and queue only where the next hop is out of reach"},
			boolean(func(v *Values) *bool { return &v.CutThrough })},
		{SettingInfo{"refuse_bare_newlines", "no", "end a session whose message has a bare CR or LF, instead of normalising it"},
			boolean(func(v *Values) *bool { return &v.RefuseBareNewlines })},
		{SettingInfo{"internal_require_tls", "no", "take mail from our networks by TLS only"},
			boolean(func(v *Values) *bool { return &v.InternalRequireTLS })},
		{SettingInfo{"proxy_from", "", "balancers whose connections must begin with a PROXY header: addresses and networks"},
			prefixes(func(v *Values) *[]netip.Prefix { return &v.ProxyFrom })},
		{SettingInfo{"xclient_from", "", "hosts that may say by XCLIENT who their client is: addresses and networks"},
			prefixes(func(v *Values) *[]netip.Prefix { return &v.XclientFrom })},
		{SettingInfo{"tunnel", "ssh", "what nodes reach each other by: ssh, or wireguard around it (UDP, same port)"}, setTunnel},
		{SettingInfo{"join_password", "yes", "let nodes join by root's password where mailproxy-pam.socket is enabled on the master"},
			boolean(func(v *Values) *bool { return &v.JoinPassword })},
	}
	table = append(table, limitSettings("", "the Internet", func(v *Values) *Limits { return &v.Limits }, "100", "200", "6000")...)
	table = append(table, limitSettings("internal_", "our networks", func(v *Values) *Limits { return &v.Internal }, "500", "2000", "0")...)
	slices.SortFunc(table, func(a, b setting) int { return cmp.Compare(a.Name, b.Name) })
	return table
}

// Settings lists every setting there is, by name.
func Settings() []SettingInfo {
	var infos []SettingInfo
	for _, s := range settingTable() {
		infos = append(infos, s.SettingInfo)
	}
	return infos
}

// CheckSetting says what is wrong with a setting's name or value.
func CheckSetting(name, value string) error {
	var v Values
	for _, s := range settingTable() {
		if s.Name == name {
			return s.set(&v, value)
		}
	}
	return unknownSetting(name)
}

func unknownSetting(name string) error {
	for _, s := range settingTable() {
		if strings.ReplaceAll(strings.ToLower(name), "-", "_") == s.Name {
			return fmt.Errorf("no such setting, did you mean %s?", s.Name)
		}
	}
	return fmt.Errorf("no such setting")
}

// Values gives the settings with their types. The error joins a *Problem for each setting that is unknown or out of bounds;
// those keep their defaults.
func (s *Snapshot) Values() (Values, error) {
	var v Values
	var c collector
	s.values(&v, &c)
	return v, c.err()
}

func (s *Snapshot) values(v *Values, c *collector) {
	table := settingTable()
	byName := make(map[string]setting, len(table))
	for _, t := range table {
		byName[t.Name] = t
		if err := t.set(v, t.Default); err != nil {
			panic("config: default of " + t.Name + ": " + err.Error()) // the table above contradicts itself
		}
	}
	for _, row := range s.Settings {
		t, ok := byName[row.Name]
		if !ok {
			c.add("setting "+row.Name, "%v", unknownSetting(row.Name))
			continue
		}
		if err := t.set(v, row.Value); err != nil {
			c.add("setting "+row.Name, "%v", err)
		}
	}
}

func size(field func(*Values) *int64, low, high int64) func(*Values, string) error {
	return func(v *Values, text string) error {
		n, err := ParseSize(text)
		if err != nil {
			return err
		}
		if n < low || n > high {
			return fmt.Errorf("%s is out of bounds, want %s to %s", text, FormatSize(low), FormatSize(high))
		}
		*field(v) = n
		return nil
	}
}

func count(field func(*Values) *int, low, high int) func(*Values, string) error {
	return func(v *Values, text string) error {
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		if n < low || n > high {
			return fmt.Errorf("%d is out of bounds, want %d to %d", n, low, high)
		}
		*field(v) = n
		return nil
	}
}

func duration(field func(*Values) *time.Duration, low, high time.Duration) func(*Values, string) error {
	return func(v *Values, text string) error {
		d, err := ParseDuration(text)
		if err != nil {
			return err
		}
		if d < low || d > high {
			return fmt.Errorf("%s is out of bounds, want %s to %s", text, FormatDuration(low), FormatDuration(high))
		}
		*field(v) = d
		return nil
	}
}

// prefixes reads addresses and networks, between them blanks or commas.
func prefixes(field func(*Values) *[]netip.Prefix) func(*Values, string) error {
	const most = 1000
	return func(v *Values, text string) error {
		words := strings.FieldsFunc(text, func(r rune) bool { return r == ' ' || r == ',' })
		if len(words) > most {
			return fmt.Errorf("%d addresses and networks, want at most %d", len(words), most)
		}
		var all []netip.Prefix
		for _, word := range words {
			p, err := parsePrefix(word)
			if err != nil {
				return err
			}
			all = append(all, p)
		}
		*field(v) = all
		return nil
	}
}

// parsePrefix reads one address or network.
func parsePrefix(word string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(word); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(word)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is neither an IP address nor a network", word)
	}
	if p.Bits() == 0 {
		return netip.Prefix{}, fmt.Errorf("%s is everyone: anybody could claim to be anybody", word)
	}
	if err := checkNetwork(Network{Prefix: p}); err != nil {
		return netip.Prefix{}, fmt.Errorf("%s %w", word, err)
	}
	return p, nil
}

func setTransportName(v *Values, text string) error {
	if text != "" {
		if err := checkTransportName(text); err != nil {
			return err
		}
	}
	v.OutboundTransport = text
	return nil
}

func setTunnel(v *Values, text string) error {
	switch kind := TunnelKind(text); kind {
	case TunnelSSH, TunnelWireGuard:
		v.Tunnel = kind
		return nil
	}
	return fmt.Errorf("%q is no kind of tunnel, want ssh or wireguard", text)
}

func setPostmaster(v *Values, text string) error {
	p, err := mail.ParsePath(strings.TrimSpace(text))
	if err != nil {
		return err
	}
	if !p.IsNull() && p.Domain == "" {
		return fmt.Errorf("%q has no domain", text)
	}
	v.Postmaster = p
	return nil
}

func boolean(field func(*Values) *bool) func(*Values, string) error {
	return func(v *Values, text string) (err error) {
		*field(v), err = parseBool(text)
		return err
	}
}

// CheckSecretName refuses what is no name for a secret.
func CheckSecretName(name string) error { return checkName("secret", name) }

func checkTransportName(name string) error { return checkName("transport", name) }

// checkName: letters, digits, dots, hyphens and underscores, so that it can stand in any text.
func checkName(of, name string) error {
	if name == "" || len(name) > 64 {
		return fmt.Errorf("a %s's name has 1 to 64 characters", of)
	}
	for i := 0; i < len(name); i++ {
		c := name[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || i > 0 && (c == '-' || c == '_' || c == '.')) {
			return fmt.Errorf("%q is no name for a %s: want lower-case letters, digits, dots, - and _", name, of)
		}
	}
	return nil
}
