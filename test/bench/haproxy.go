package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// startHAProxy starts one that passes TCP from addr to the sink.
func (b *bench) startHAProxy(ctx context.Context, addr, to string) error {
	file := filepath.Join(b.dir, "haproxy.cfg")
	text := fmt.Sprintf(`global
  maxconn 4096
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend smtp
  bind %s
  default_backend sink
backend sink
  server sink %s
`, addr, to)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	p, err := b.start("haproxy", nil, "haproxy", "-db", "-f", file)
	if err != nil {
		return err
	}
	return p.answers(ctx, addr)
}
