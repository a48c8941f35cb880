package filter

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"mailproxy/config"
	"mailproxy/mail"
)

// A Ruleset is a compiled configuration.
type Ruleset struct {
	values     config.Values
	position   config.Position
	postmaster mail.Path // where a bare postmaster goes; null where there is no domain
	domains    config.Domains
	transports map[string]config.Transport
	outbound   config.Transport
	networks   networks
	recipients []config.RecipientList
	tlsSenders []config.TLSSender
	balancers  networks
	frontends  networks
}

// Compile makes a Ruleset of a snapshot that config.Validate takes, which is what looks at domains and recipients: there may be many.
// The error joins a *CompileError for each other object that is wrong.
func Compile(s *config.Snapshot) (*Ruleset, error) {
	values, err := s.Values()
	errs := fromProblems(err)
	r := &Ruleset{values: values, position: s.Position, transports: make(map[string]config.Transport, len(s.Transports)),
		domains: s.Domains}
	for _, t := range s.Transports {
		r.transports[t.Name] = t
	}
	if values.OutboundTransport != "" {
		t, ok := r.transports[values.OutboundTransport]
		if !ok {
			errs = append(errs, &CompileError{"setting outbound_transport", "no such transport: " + values.OutboundTransport})
		}
		r.outbound = t
	} else {
		r.outbound = config.Transport{Name: "mx", TLS: config.TLSMay}
	}
	if r.networks, err = compileNetworks(s.Networks); err != nil {
		errs = append(errs, err)
	}
	r.balancers, r.frontends = networksOf(values.ProxyFrom), networksOf(values.XclientFrom)
	r.recipients, r.tlsSenders = s.Recipients, slices.Clone(s.TLSSenders)
	slices.SortFunc(r.tlsSenders, func(a, b config.TLSSender) int { return cmp.Compare(a.Domain, b.Domain) })
	if !slices.IsSortedFunc(s.Recipients, func(a, b config.RecipientList) int { return cmp.Compare(a.Domain, b.Domain) }) {
		errs = append(errs, &CompileError{"recipients", "are not in order"})
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	r.postmaster = values.Postmaster
	if r.postmaster.IsNull() {
		for first := range r.domains.All() {
			r.postmaster = mail.Path{Local: "postmaster", Domain: first.Name}
			break
		}
	}
	return r, nil
}

// Settings are the typed settings.
func (r *Ruleset) Settings() config.Values { return r.values }

// Position is that of the snapshot that the Ruleset was made from.
func (r *Ruleset) Position() config.Position { return r.position }

// Trusted says whether client is in one of our own networks and so may send to anywhere.
func (r *Ruleset) Trusted(client netip.Addr) bool { return r.networks.has(client) }

// Balancer says whether a connection from addr must begin with a PROXY header; from others it may not.
func (r *Ruleset) Balancer(addr netip.Addr) bool { return r.balancers.has(addr) }

// Frontend says whether addr may say by XCLIENT who its client is.
func (r *Ruleset) Frontend(addr netip.Addr) bool { return r.frontends.has(addr) }

// Ours says whether we relay for to's domain.
func (r *Ruleset) Ours(to mail.Path) bool { return r.domain(to.Domain) != nil }

// Accepts says whether mail from client for to is taken: what AcceptsOurs takes, and from our networks mail to anywhere.
func (r *Ruleset) Accepts(client netip.Addr, to mail.Path) (mail.Path, *mail.Reply) {
	path, refused := r.AcceptsOurs(to)
	if refused == replyDenied && r.Trusted(client) {
		return to, nil
	}
	return path, refused
}

var replyDenied = &mail.Reply{Code: 554, Enhanced: [3]int{5, 7, 1}, Text: "relay access denied"}

// AcceptsOurs says whether mail for to is taken from everyone. The Path is where it goes: to itself, or for a bare postmaster the one
// of the settings. The reply refuses. A way behind our domains may not be named either.
func (r *Ruleset) AcceptsOurs(to mail.Path) (mail.Path, *mail.Reply) {
	switch {
	case to.IsNull():
		return to, &mail.Reply{Code: 501, Enhanced: [3]int{5, 1, 3}, Text: "a recipient is wanted"}
	case to.Domain == "" && r.postmaster.IsNull():
		return to, &mail.Reply{Code: 451, Enhanced: [3]int{4, 3, 5}, Text: "no postmaster is configured yet, try again later"}
	case to.Domain == "":
		return r.postmaster, nil // RFC 5321 §4.5.1: always taken
	case r.Ours(to) && !routes(to.Local):
		return to, nil
	}
	return to, replyDenied
}

// routes says whether a local part can name another host to go on to: x%host, host!x, "x@host". A next hop that trusts us and
// follows it would make the two of us an open relay.
func routes(local string) bool { return strings.ContainsAny(local, "%!@") }

// Route gives the way to a forward-path with a domain. A domain with hosts of its own has a transport named "domain:NAME".
// The reply says that there is none.
func (r *Ruleset) Route(to mail.Path) (config.Transport, *mail.Reply) {
	d := r.domain(to.Domain)
	switch {
	case to.Domain == "":
		return config.Transport{}, &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 3}, Text: "address without a domain"}
	case d == nil:
		return r.outbound, nil
	case d.Transport != "":
		return r.transports[d.Transport], nil
	}
	return config.Transport{Name: "domain:" + d.Name, Hosts: d.Hosts, TLS: config.TLSMay}, nil
}

// Transport gives the transport of a name.
func (r *Ruleset) Transport(name string) (config.Transport, bool) {
	t, ok := r.transports[name]
	return t, ok
}

// RequiresTLS says whether mail from the domain of a reverse-path is taken by TLS only.
func (r *Ruleset) RequiresTLS(from mail.Path) bool {
	if len(r.tlsSenders) == 0 {
		return false
	}
	_, ok := slices.BinarySearchFunc(r.tlsSenders, config.ASCIIDomain(from.Domain), func(t config.TLSSender, name string) int { return cmp.Compare(t.Domain, name) })
	return ok
}

// Listed says whether the domain of to has a list of its recipients, and whether to is on it, written in any case, and as local or
// local+tag; named is false where it is there only as Everyone, which says nothing of whether it exists. Where it has a list its next hop
// need not be asked.
func (r *Ruleset) Listed(to mail.Path) (listed, known, named bool) {
	if len(r.recipients) == 0 {
		return false, false, false
	}
	d := r.domain(to.Domain)
	if d == nil {
		return false, false, false
	}
	locals := config.RecipientsOf(r.recipients, d.Name)
	if len(locals) == 0 {
		return false, false, false
	}
	local := strings.ToLower(to.Local)
	base, _, _ := strings.Cut(local, "+")
	has := func(x string) bool { _, ok := slices.BinarySearch(locals, x); return ok }
	named = local != config.Everyone && has(local) || base != config.Everyone && has(base)
	return true, named || has(config.Everyone), named
}

// domain finds one of our domains, U-labels by their A-labels; nil where it is not ours.
func (r *Ruleset) domain(name string) *config.Domain {
	return r.domains.Get(config.ASCIIDomain(name))
}
