package main

// ampleRoom is the room in the spool, beyond its reserve, from which on a node counts as empty.
const ampleRoom = 1 << 30

// weight is what the agent listener says of this node's load.
func (d *daemon) weight() int {
	room, err := d.queue.Free()
	rules := d.config.rules.Load()
	if err != nil || rules == nil || d.smtpd == nil {
		return 0
	}
	open, v := d.smtpd.Stats(), rules.Settings()
	return weightOf(room, sideLoad{open.Open - open.OpenInternal, v.MaxSessions}, sideLoad{open.OpenInternal, v.Internal.MaxSessions})
}

// A sideLoad is how many sessions of one side are open, and how many may be.
type sideLoad struct{ open, most int }

// weightOf is how much more mail a node can take, in percent: the least of the room that is left in the spool, of 1 GiB, and of the
// sessions that are free, of those that there may be from the Internet, and from our networks. 0 is none.
func weightOf(room int64, sides ...sideLoad) int {
	weight := int(100 * min(room, ampleRoom) / ampleRoom)
	for _, side := range sides {
		weight = min(weight, 100*(side.most-side.open)/side.most)
	}
	return max(0, weight)
}
