package config

import (
	"reflect"
	"strings"
	"testing"
)

func TestCountsNameEverythingThatCanBeLost(t *testing.T) {
	s := Snapshot{
		Domains: NewDomains([]Domain{{Name: "a.test"}, {Name: "b.test"}}), Recipients: make([]RecipientList, 1), Transports: make([]Transport, 1), Networks: make([]Network, 3),
		Certificates: make([]Certificate, 1), TLSSenders: make([]TLSSender, 1),
	}
	const want = "2 domains, 1 list of recipients, 1 transport, 3 networks, 1 certificate, 1 TLS sender, 0 settings"
	if got := s.Counts(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	lists := 0
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Parts]()) {
		if f.Type.Kind() == reflect.Slice {
			lists++
		}
	}
	if got := strings.Count(want, ",") + 1; got != lists {
		t.Errorf("%d are counted of %d lists that a configuration has", got, lists)
	}
}
