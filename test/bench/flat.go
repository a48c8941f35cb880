package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"mailproxy/config"
)

const (
	fewIP  = "127.0.0.35"
	manyIP = "127.0.0.36"
	few    = 10
	many   = 100_000
)

// measureFlat compares a node that has few domains and recipients with one that has many: what a message costs must not depend on that.
func measureFlat(ctx context.Context, b *bench) error {
	l := &lane{}
	var err error
	if l.sink, err = b.startSink(ctx, sinkAddr); err != nil {
		return err
	}
	var rows []*row
	for _, n := range []struct {
		name, ip string
		count    int
	}{{"few", fewIP, few}, {"many", manyIP, many}} {
		node, err := b.startNode(ctx, n.name, n.ip)
		if err != nil {
			return err
		}
		if err := node.relaysMany(ctx, n.count); err != nil {
			return err
		}
		rows = append(rows, &row{name: n.name, addr: node.smtp(), kept: 10000})
	}
	l.postfix = &postfix{}
	err = inRounds(rows, func(r *row) error { return l.round(ctx, b, r, load{messages: r.kept, kept: true}) })
	if err != nil {
		return err
	}
	for _, r := range rows {
		b.addRounds("smtp.flat."+r.name+".msgs_per_s", "msg/s", goal{}, r.answered)
	}
	b.addRounds("smtp.flat.many_vs_few", "x", atLeast(0.9), ratios(rows[1].answered, rows[0].answered))
	return nil
}

// relaysMany gives the node so many domains and, for liveDomain, so many recipients, of which the one that mail is sent to is the last.
func (n *node) relaysMany(ctx context.Context, count int) error {
	domains := append(benchDomains(count), config.Domain{Name: liveDomain, Hosts: []string{sinkAddr}})
	s := config.Snapshot{Settings: unlimited(), Domains: config.NewDomains(domains)}
	file := filepath.Join(n.b.dir, n.name+".toml")
	if err := os.WriteFile(file, s.Text(), 0o644); err != nil {
		return err
	}
	if _, err := n.mailproxy(ctx, "config", "apply", "--yes", file); err != nil {
		return err
	}
	list := filepath.Join(n.b.dir, n.name+".recipients")
	out, err := os.Create(list)
	if err != nil {
		return err
	}
	defer out.Close()
	for i := range count {
		if _, err := fmt.Fprintf(out, "r%06d@%s\n", i, liveDomain); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprintf(out, "user@%s\n", liveDomain); err != nil {
		return err
	}
	_, err = n.mailproxy(ctx, "domain", "recipients", "import", liveDomain, list)
	return err
}
