package config

import (
	"fmt"
	"testing"
)

// BenchmarkValidate is what each reload costs with 100,000 domains.
func BenchmarkValidate(b *testing.B) {
	s := &Snapshot{}
	for i := range 100_000 {
		s.Domains = append(s.Domains, Domain{Name: fmt.Sprintf("d%06d.example.test", i), Hosts: []string{"127.0.0.1:2525"}})
	}
	for b.Loop() {
		if err := Validate(s); err != nil {
			b.Fatal(err)
		}
	}
}
