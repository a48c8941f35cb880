package filter

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

func TestADomainMayHaveAListOfItsRecipients(t *testing.T) {
	s := sample()
	s.Recipients = []config.RecipientList{
		{Domain: "one.test", Locals: []string{"a+b", "info", "sales"}}, {Domain: "xn--bcher-kva.test", Locals: []string{"*"}},
	}
	r := compile(t, s)
	for _, c := range []struct {
		to            string
		listed, known bool
	}{
		{"info@one.test", true, true}, {"INFO@ONE.test", true, true}, {"info+x+y@one.test", true, true}, {"other@one.test", true, false},
		{"a+b@one.test", true, true}, {"a@one.test", true, false}, {"a+c@one.test", true, false}, {"+info@one.test", true, false},
		{"anyone@b\u00fccher.test", true, true}, {"*@b\u00fccher.test", true, true}, {"*+x@b\u00fccher.test", true, true}, {"info@two.test", false, false}, {"info@elsewhere.test", false, false},
	} {
		if listed, known, named := r.Listed(path(t, c.to)); listed != c.listed || known != c.known || named != (known && !strings.HasSuffix(c.to, "b\u00fccher.test")) {
			t.Errorf("%s: listed %v, known %v, named %v", c.to, listed, known, named)
		}
	}
	s.Recipients[0], s.Recipients[1] = s.Recipients[1], s.Recipients[0]
	if _, err := Compile(s); err == nil {
		t.Error("lists out of order are taken")
	}
}

// large has so many domains, each with one recipient, and as many recipients of another.
func large(n int) *config.Snapshot {
	s := &config.Snapshot{}
	domains := []config.Domain{{Name: "a.test", Hosts: []string{"10.0.0.1:25"}}}
	all := config.RecipientList{Domain: "a.test"}
	for i := range n {
		all.Locals = append(all.Locals, fmt.Sprintf("r%06d", i))
	}
	s.Recipients = append(s.Recipients, all)
	for i := range n {
		name := fmt.Sprintf("d%06d.test", i)
		domains = append(domains, config.Domain{Name: name, Hosts: []string{"10.0.0.1:25"}})
		s.Recipients = append(s.Recipients, config.RecipientList{Domain: name, Locals: []string{"info"}})
	}
	s.Domains = config.NewDomains(domains)
	return s
}

func decideAll(t testing.TB, r *Ruleset, paths ...mail.Path) {
	for _, p := range paths {
		if _, refused := r.AcceptsOurs(p); refused != nil {
			t.Fatal(refused)
		}
		if _, refused := r.Route(p); refused != nil {
			t.Fatal(refused)
		}
		if _, known, _ := r.Listed(p); !known {
			t.Fatalf("%v is not known", p)
		}
	}
}

func TestManyRecipientsCostNothingToCompileAndNothingByMessage(t *testing.T) {
	s := large(100_000)
	start := time.Now()
	r := compile(t, s)
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("compiling takes %v", took)
	}
	a, b := mail.Path{Local: "r050000", Domain: "a.test"}, mail.Path{Local: "info", Domain: "d099999.test"}
	if n := testing.AllocsPerRun(100, func() { decideAll(t, r, a, b) }); n > 2 { // the name of a domain's transport
		t.Errorf("%v allocations for two recipients", n)
	}
}

// BenchmarkRecipient is what filter costs for two recipients, beside domains and recipients of that number.
func BenchmarkRecipient(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r := compile(b, large(n))
			one, two := mail.Path{Local: fmt.Sprintf("r%06d", n/2), Domain: "a.test"}, mail.Path{Local: "info", Domain: fmt.Sprintf("d%06d.test", n-1)}
			for b.Loop() {
				decideAll(b, r, one, two)
			}
		})
	}
}
