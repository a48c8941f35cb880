package cluster

import (
	"context"

	"mailproxy/config"
)

// heldByAll gives the newest position of our own epoch that every other member is known to hold, and false where one was not heard in this
// epoch. One that is ahead of us holds other commits under our numbers, or will.
func heldByAll(mine config.Position, others []standing) (config.Position, bool) {
	held := mine
	for _, o := range others {
		theirs := o.state.Position
		if o.answered.IsZero() || theirs.Epoch != mine.Epoch || theirs.Serial > mine.Serial {
			return held, false
		}
		held.Serial = min(held.Serial, theirs.Serial)
	}
	return held, true
}

// What was forgotten: where we were then, and up to where.
type forgotten struct{ mine, held config.Position }

// forgetTrimmed drops the copies of trimmed commits that every member holds by now, when something was committed here or there. What one
// that is away does not hold may have to be set aside here yet.
func (n *Node) forgetTrimmed(ctx context.Context) {
	mine, others := n.known(), n.standings()
	held, ok := heldByAll(mine.Position, others)
	now := forgotten{mine.Position, held}
	if !ok || mine.CID == 0 || now == n.forgotten {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := n.o.DB.ForgetTrimmed(ctx, held); err != nil {
		n.warn(ctx, "history.forget", 0, err)
		return
	}
	n.forgotten = now
}
