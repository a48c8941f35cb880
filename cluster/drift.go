package cluster

import (
	"context"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// drift is rows that were found to differ from what commits and pushes have put there.
type drift struct {
	at    config.Position // with the digest that the rows should have
	rows  config.Digest   // what they have
	found time.Time
}

// over says whether the drift is gone: the node has moved on by a push or commit, or is back at the digest that it should have.
func (d *drift) over(now config.Position) bool {
	return now.Compare(d.at) != 0 || now.Digest == d.at.Digest
}

// drifted says whether rows changed between two readings of the state without a commit or a push.
func drifted(before, now db.State) bool {
	return before.CID == now.CID && before.ClusterID == now.ClusterID && now.Position.Epoch.N > 0 &&
		before.Position.Compare(now.Position) == 0 && before.Position.Digest != now.Position.Digest
}

// checkDrift recomputes the digest from the rows again and again, in the background.
func (n *Node) checkDrift(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := n.verify(ctx, n.o.DB.VerifyAside); err != nil {
			n.warn(ctx, "drift.check", 0, err)
		}
		n.pause(ctx, n.o.Timing.Drift)
	}
	return ctx.Err()
}

// verify compares the kept digest with the rows. Where they differ the database sets the kept one right, so that the position tells
// everybody the truth and a push by tables knows what to repair; what it should be stays known here.
func (n *Node) verify(ctx context.Context, look func(context.Context) (kept, rows config.Digest, err error)) error {
	before, err := n.ownState(ctx)
	if err != nil {
		return err
	}
	kept, rows, err := look(ctx)
	if err != nil {
		return err
	}
	if kept != rows && kept == before.Position.Digest {
		n.mu.Lock()
		n.foundDriftLocked(before.Position, rows)
		n.mu.Unlock()
	}
	_, err = n.refresh(ctx)
	return err
}

// foundDriftLocked keeps and logs a drift, once.
func (n *Node) foundDriftLocked(at config.Position, rows config.Digest) {
	if n.drift != nil {
		return
	}
	n.drift = &drift{at: at, rows: rows, found: n.o.Now()}
	n.o.Log.Error().Int("node", int(n.state.CID)).Stringer("epoch", at.Epoch).Int64("serial", at.Serial).
		Stringer("digest", rows).Stringer("wanted", at.Digest).Msg("drift.found")
}
