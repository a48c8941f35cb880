package main

// ampleRoom is the room in the spool, beyond its reserve, from which on a node counts as empty.
const ampleRoom = 1 << 30

// weight is what the agent listener says of this node's load.
func (d *daemon) weight() int {
	open, most := 0, 0
	if rules := d.config.rules.Load(); rules != nil && d.smtpd != nil {
		open, most = d.smtpd.Stats().Open, rules.Settings().MaxSessions
	}
	room, err := d.queue.Free()
	if err != nil {
		room = 0
	}
	return weightOf(open, most, room)
}

// weightOf is how much more mail a node can take, in percent: the lesser of the sessions that are free, of all there may be, and of the
// room that is left in the spool, of 1 GiB. 0 is none.
func weightOf(open, most int, room int64) int {
	sessions := 0
	if most > 0 {
		sessions = 100 * (most - open) / most
	}
	return max(0, min(sessions, int(100*min(room, ampleRoom)/ampleRoom)))
}
