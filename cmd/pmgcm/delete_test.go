package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func TestADeleteThatLessThanAMajorityKnowsIsNotInSync(t *testing.T) {
	for _, c := range []struct {
		name     string
		majority bool
		missing  []config.Node
		want     error
	}{
		{"less than a majority knows", false, []config.Node{{Name: "mx2", CID: 2}}, cluster.ErrNotInSync},
		{"a majority knows", true, []config.Node{{Name: "mx2", CID: 2}}, nil},
		{"all know", true, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			ctx := cli.NewContext(&cli.App{Writer: &out}, nil, nil)
			err := printDeleted(ctx, cluster.Deleted{Node: config.Node{Name: "mx3", CID: 3}, Missing: c.missing, Majority: c.majority})
			if !errors.Is(err, c.want) || !strings.Contains(out.String(), "mx3(3) deleted") || strings.Contains(out.String(), "mx2(2)") != (c.missing != nil) {
				t.Errorf("%v, %q", err, out.String())
			}
		})
	}
}
