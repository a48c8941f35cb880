package cluster

import (
	"fmt"

	"mailproxy/tunnel"
)

// ghosts names two live daemons of one identity, on both of them and on whoever refused one: a machine was cloned. The one that was
// connected first stays.
func (n *Node) ghosts() []Problem {
	var out []Problem
	peers := n.peers()
	const clone = "on the clone: `systemctl stop mailproxy`, remove `keys`, `pg` and `pg.made` in its state directory, start it, and join as a new node"
	own := false
	for _, p := range n.o.Tunnel.Peers() {
		peer, _ := memberOf(peers, p.CID)
		if p.Ghost != "" {
			out = append(out, Problem{fmt.Sprintf("two live daemons are %s: the one at %s came second and is refused", label(peer), p.Ghost), clone})
		}
		if what := twin(p); what != "" && !own {
			own = true // the same from every peer
			out = append(out, Problem{fmt.Sprintf("two live daemons have this node's identity: %s, says %s", what, label(peer)), clone})
		}
	}
	return out
}

// twin says what a peer knows of another daemon of this node.
func twin(p tunnel.PeerState) string {
	switch {
	case p.TwinRefused:
		return "this one came second and is refused"
	case p.TwinAt != "":
		return "another one at " + p.TwinAt + " is refused"
	}
	return ""
}
