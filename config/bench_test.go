package config

import (
	"fmt"
	"path/filepath"
	"testing"
)

func manyDomains(n int) Domains {
	var list []Domain
	for i := range n {
		list = append(list, Domain{Name: fmt.Sprintf("d%06d.example.test", i), Hosts: []string{"127.0.0.1:2525"}})
	}
	return NewDomains(list)
}

// BenchmarkValidate is what a start costs with 100,000 domains.
func BenchmarkValidate(b *testing.B) {
	s := &Snapshot{Domains: manyDomains(100_000)}
	for b.Loop() {
		if err := Validate(s); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkChange is one domain of 100,000 that is changed, and checked.
func BenchmarkChange(b *testing.B) {
	s := &Snapshot{Domains: manyDomains(100_000)}
	changed := &Domain{Name: "d055555.example.test", Hosts: []string{"127.0.0.1:25"}}
	b.ReportAllocs()
	for b.Loop() {
		after := &Snapshot{Domains: s.Domains.Patch(map[string]*Domain{changed.Name: changed})}
		if err := ValidateAfter(s, after); err != nil {
			b.Fatal(err)
		}
		s = after
	}
}

// BenchmarkSave is what is written every few seconds while the configuration changes.
func BenchmarkSave(b *testing.B) {
	s := &Snapshot{Domains: manyDomains(100_000)}
	file := filepath.Join(b.TempDir(), "snapshot.json")
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Save(file); err != nil {
			b.Fatal(err)
		}
	}
}
