package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// maxText bounds a configuration text: 100,000 domains take a tenth of it.
const maxText = 128 << 20

// Parts is what an administrator writes of a Snapshot, as `config show` prints and `config apply` reads it.
type Parts struct {
	Settings   []Setting
	Networks   []Network
	Transports []Transport
	Domains    []Domain
	Recipients []RecipientList

	Certificates []Certificate
	TLSSenders   []TLSSender
	// lines says where an object ("domain example.test") stands in the text.
	lines map[string]int
}

// Empty says whether there is nothing in it.
func (p *Parts) Empty() bool {
	return len(p.Settings)+len(p.Networks)+len(p.Transports)+len(p.Domains)+len(p.Certificates)+len(p.TLSSenders) == 0
}

// Line gives the line in which an object ("domain example.test") stands in the text that was parsed; 0 where it does not.
func (p *Parts) Line(object string) int { return p.lines[object] }

// Locate gives err's problems with the lines of the text filled in, joined again; another error is given as it is.
func (p *Parts) Locate(err error) error {
	problems := Problems(err)
	if len(problems) == 0 {
		return err
	}
	located := make([]error, len(problems))
	for i, problem := range problems {
		copied := *problem
		if copied.Line == 0 {
			copied.Line = p.lines[copied.Object]
		}
		located[i] = &copied
	}
	slices.SortStableFunc(located, func(a, b error) int { return cmp.Compare(a.(*Problem).Line, b.(*Problem).Line) })
	return errors.Join(located...)
}

// With gives a copy of s whose settings, networks, transports and domains are those of p.
func (s *Snapshot) With(p *Parts) *Snapshot {
	n := *s
	n.Settings, n.Networks, n.Transports, n.Domains = p.Settings, p.Networks, p.Transports, NewDomains(p.Domains)
	n.Recipients, n.Certificates, n.TLSSenders = p.Recipients, p.Certificates, p.TLSSenders
	return &n
}

// textFile is the shape of the text.
type textFile struct {
	Settings  map[string]any  `toml:"settings"`
	Network   []textNetwork   `toml:"network"`
	Transport []textTransport `toml:"transport"`
	Domain    []textDomain    `toml:"domain"`

	Certificate []textCertificate `toml:"certificate"`
	TLSSender   []textTLSSender   `toml:"tls_sender"`
}

type textCertificate struct {
	Name  string `toml:"name"`
	Chain string `toml:"chain"`
	Key   string `toml:"key"`
}

type textTLSSender struct {
	Domain  string `toml:"domain"`
	Comment string `toml:"comment"`
}

type textNetwork struct {
	Prefix  string `toml:"prefix"`
	Comment string `toml:"comment"`
}

type textTransport struct {
	Name     string   `toml:"name"`
	Hosts    []string `toml:"hosts"`
	Order    string   `toml:"order"`
	TLS      string   `toml:"tls"`
	User     string   `toml:"user"`
	Password string   `toml:"password"`
	Tell     string   `toml:"tell"`
	Life     string   `toml:"queue_life"`
}

type textDomain struct {
	Name      string   `toml:"name"`
	Transport string   `toml:"transport"`
	Hosts     []string `toml:"hosts"`
	Comment   string   `toml:"comment"`

	Recipients []string `toml:"recipients"`
}

// ParseText reads what Text gives: TOML with [settings], [[network]], [[transport]], [[domain]], [[certificate]] and [[tls_sender]]. Names, hosts and networks
// come out in their normal forms, each list sorted as in a Snapshot. The error joins a *Problem with its line for everything
// that cannot be read; whether the parts make sense together is for Validate to say.
func ParseText(text []byte) (*Parts, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("text of %s, want at most %s", FormatSize(int64(len(text))), FormatSize(maxText))
	}
	var f textFile
	meta, err := toml.Decode(string(text), &f)
	if err != nil {
		return nil, decodeProblem(err)
	}
	p := &Parts{lines: map[string]int{}}
	r := textReader{parts: p, index: indexLines(string(text)), collector: collector{lines: p.lines}}
	r.unknown(meta.Undecoded())
	r.settings(f.Settings)
	for i, n := range f.Network {
		r.network(i, n)
	}
	for i, t := range f.Transport {
		r.transport(i, t)
	}
	for i, d := range f.Domain {
		r.domain(i, d)
	}
	for i, c := range f.Certificate {
		r.certificate(i, c)
	}
	for i, t := range f.TLSSender {
		r.tlsSender(i, t)
	}
	p.sort()
	if err := r.err(); err != nil {
		return nil, p.Locate(err)
	}
	return p, nil
}

// decodeProblem gives the decoder's error as a Problem.
func decodeProblem(err error) error {
	var parse toml.ParseError
	if errors.As(err, &parse) {
		return &Problem{Reason: strings.TrimPrefix(parse.Message, "toml: "), Line: parse.Position.Line}
	}
	reason := strings.TrimPrefix(err.Error(), "toml: ")
	var line int
	if rest, ok := strings.CutPrefix(reason, "line "); ok { // type errors carry their line in the text only
		if number, tail, ok := strings.Cut(rest, " "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				line, reason = n, tail
			}
		}
	}
	return &Problem{Reason: reason, Line: line}
}

// textReader turns what was decoded into parts.
type textReader struct {
	collector
	parts *Parts
	index *lineIndex
}

func (r *textReader) problem(object string, line int, format string, args ...any) {
	r.errs = append(r.errs, &Problem{Object: object, Reason: fmt.Sprintf(format, args...), Line: line})
}

// named notes where an object stands; a second one of the same name is a problem.
func (r *textReader) named(object string, line int) bool {
	if first, ok := r.parts.lines[object]; ok {
		r.problem(object, line, "stands there twice, first in line %d", first)
		return false
	}
	r.parts.lines[object] = line
	return true
}

func (r *textReader) unknown(keys []toml.Key) {
	seen := map[string]bool{}
	for _, k := range keys {
		path := strings.Join(k, ".")
		if seen[path] || k[0] == "settings" && len(k) == 2 {
			continue
		}
		seen[path] = true
		lines := r.index.all(path)
		if len(lines) == 0 {
			lines = []int{r.index.line(path, 0)}
		}
		for _, line := range lines {
			r.problem("", line, "unknown key %q", path)
		}
	}
}

func (r *textReader) settings(values map[string]any) {
	for name, value := range values {
		line := r.index.line("settings."+name, 0)
		var text string
		switch v := value.(type) {
		case string:
			text = v
		case int64:
			text = strconv.FormatInt(v, 10)
		case bool:
			text = "no"
			if v {
				text = "yes"
			}
		default:
			r.problem("setting "+name, line, "want a text, a whole number, true or false")
			continue
		}
		r.parts.lines["setting "+name] = line
		r.parts.Settings = append(r.parts.Settings, Setting{Name: name, Value: text})
	}
}

func (r *textReader) network(i int, n textNetwork) {
	line := r.index.line("network", i)
	prefix, err := ParseNetwork(n.Prefix)
	if err != nil {
		r.problem("network "+n.Prefix, line, "%v", err)
		return
	}
	if r.named("network "+prefix.String(), line) {
		r.parts.Networks = append(r.parts.Networks, Network{Prefix: prefix, Comment: n.Comment})
	}
}

func (r *textReader) transport(i int, t textTransport) {
	line := r.index.line("transport", i)
	object := "transport " + t.Name
	hosts := r.hosts(object, line, t.Hosts)
	var life Duration
	if err := life.UnmarshalText([]byte(t.Life)); err != nil {
		r.problem(object, line, "queue_life: %v", err)
	}
	if r.named(object, line) {
		r.parts.Transports = append(r.parts.Transports, Transport{Name: t.Name, Hosts: hosts, Order: Order(t.Order), TLS: TLS(t.TLS),
			User: t.User, Password: t.Password, Tell: Tell(t.Tell), QueueLife: life})
	}
}

func (r *textReader) domain(i int, d textDomain) {
	line := r.index.line("domain", i)
	name, err := NormalizeDomain(d.Name)
	if err != nil {
		r.problem("domain "+d.Name, line, "%v", err)
		return
	}
	hosts := r.hosts("domain "+name, line, d.Hosts)
	if r.named("domain "+name, line) {
		r.parts.Domains = append(r.parts.Domains, Domain{Name: name, Transport: d.Transport, Hosts: hosts, Comment: d.Comment})
		r.recipients(name, line, d.Recipients)
	}
}

func (r *textReader) certificate(i int, c textCertificate) {
	line := r.index.line("certificate", i)
	name, err := NormalizeCertificateName(c.Name)
	if err != nil {
		r.problem("certificate "+c.Name, line, "%v", err)
		return
	}
	if r.named("certificate "+name, line) {
		r.parts.Certificates = append(r.parts.Certificates, Certificate{Name: name, Chain: c.Chain, Key: c.Key})
	}
}

func (r *textReader) tlsSender(i int, t textTLSSender) {
	line := r.index.line("tls_sender", i)
	name, err := NormalizeDomain(t.Domain)
	if err != nil {
		r.problem("tls_sender "+t.Domain, line, "%v", err)
		return
	}
	if r.named("tls_sender "+name, line) {
		r.parts.TLSSenders = append(r.parts.TLSSenders, TLSSender{Domain: name, Comment: t.Comment})
	}
}

// recipients reads local parts, as they are without quoting.
func (r *textReader) recipients(domain string, line int, given []string) {
	if len(given) == 0 {
		return
	}
	locals := make([]string, len(given))
	for i, x := range given {
		locals[i] = strings.ToLower(x)
	}
	slices.Sort(locals)
	r.parts.lines[recipientsObject(domain)] = line
	r.parts.Recipients = append(r.parts.Recipients, RecipientList{Domain: domain, Locals: slices.Compact(locals)})
}

func (r *textReader) hosts(object string, line int, given []string) []string {
	var hosts []string
	for _, h := range given {
		host, err := NormalizeHost(h, "25")
		if err != nil {
			r.problem(object, line, "%v", err)
			continue
		}
		hosts = append(hosts, host)
	}
	return hosts
}

func (p *Parts) sort() {
	slices.SortFunc(p.Settings, func(a, b Setting) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(p.Networks, func(a, b Network) int { return ComparePrefix(a.Prefix, b.Prefix) })
	slices.SortFunc(p.Transports, func(a, b Transport) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(p.Domains, func(a, b Domain) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(p.Certificates, func(a, b Certificate) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(p.TLSSenders, func(a, b TLSSender) int { return cmp.Compare(a.Domain, b.Domain) })
	slices.SortFunc(p.Recipients, func(a, b RecipientList) int { return cmp.Compare(a.Domain, b.Domain) })
}

// ParseNetwork reads a network (10.0.0.0/8, 2001:db8::/32) or a single address, which is a network of one host.
func ParseNetwork(s string) (netip.Prefix, error) {
	s = strings.TrimSpace(s)
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is neither a network such as 10.0.0.0/8 nor an IP address", s)
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s has bits set behind its length, did you mean %v?", s, p.Masked())
	}
	return p, nil
}

// ComparePrefix orders networks by address, then by length; IPv4 first.
func ComparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return cmp.Compare(a.Bits(), b.Bits())
}

// Text gives the configuration as TOML for people, git and ParseText: in a stable order, without what was not set.
func (s *Snapshot) Text() []byte {
	var b bytes.Buffer
	p := Parts{Settings: slices.Clone(s.Settings), Networks: slices.Clone(s.Networks), Transports: slices.Clone(s.Transports),
		Certificates: slices.Clone(s.Certificates), TLSSenders: slices.Clone(s.TLSSenders)}
	p.sort()
	fmt.Fprintf(&b, "# mailproxy configuration at %v\n", s.Position)
	if len(p.Settings) > 0 {
		b.WriteString("\n[settings]\n")
		for _, x := range p.Settings {
			fmt.Fprintf(&b, "%s = %s\n", bareOrQuoted(x.Name), quote(x.Value))
		}
	}
	for _, x := range p.Networks {
		b.WriteString("\n[[network]]\n")
		writeString(&b, "prefix", x.Prefix.String())
		writeString(&b, "comment", x.Comment)
	}
	for _, x := range p.Transports {
		b.WriteString("\n[[transport]]\n")
		writeString(&b, "name", x.Name)
		writeList(&b, "hosts", x.Hosts)
		writeString(&b, "order", string(x.Order))
		writeString(&b, "tls", string(x.TLS))
		writeString(&b, "user", x.User)
		writeString(&b, "password", x.Password)
		writeString(&b, "tell", string(x.Tell))
		writeString(&b, "queue_life", x.QueueLife.String())
	}
	for x := range s.Domains.All() {
		b.WriteString("\n[[domain]]\n")
		writeString(&b, "name", x.Name)
		writeString(&b, "transport", x.Transport)
		writeList(&b, "hosts", x.Hosts)
		writeString(&b, "comment", x.Comment)
		writeLines(&b, "recipients", RecipientsOf(s.Recipients, x.Name))
	}
	for i := range p.Certificates {
		x := &p.Certificates[i]
		b.WriteString("\n[[certificate]]\n")
		writeString(&b, "name", x.Name)
		if isPEM(x.Chain) {
			b.WriteString("chain = '''\n" + x.Chain + "'''\n")
		} else {
			writeString(&b, "chain", x.Chain)
		}
		writeString(&b, "key", x.Key)
	}
	for _, x := range p.TLSSenders {
		b.WriteString("\n[[tls_sender]]\n")
		writeString(&b, "domain", x.Domain)
		writeString(&b, "comment", x.Comment)
	}
	return b.Bytes()
}

// writeLines writes a list that may be long, one a line.
func writeLines(b *bytes.Buffer, key string, values []string) {
	if len(values) == 0 {
		return
	}
	b.WriteString(key + " = [\n")
	for _, v := range values {
		b.WriteString("  " + quote(v) + ",\n")
	}
	b.WriteString("]\n")
}

func writeString(b *bytes.Buffer, key, value string) {
	if value == "" {
		return
	}
	b.WriteString(key + " = " + quote(value) + "\n")
}

func writeList(b *bytes.Buffer, key string, values []string) {
	if len(values) == 0 {
		return
	}
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = quote(v)
	}
	b.WriteString(key + " = [" + strings.Join(quoted, ", ") + "]\n")
}

func bareOrQuoted(key string) string {
	for i := 0; i < len(key); i++ {
		c := key[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-') {
			return quote(key)
		}
	}
	if key == "" {
		return `""`
	}
	return key
}

// quote gives a TOML basic string.
func quote(s string) string {
	var b strings.Builder
	b.Grow(len(s) + 2)
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		case r == utf8.RuneError:
			b.WriteRune(utf8.RuneError)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
