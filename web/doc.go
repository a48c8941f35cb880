// Package web is the daemon's HTTP: what must work while PostgreSQL is down. One set of handlers is served at three doors:
//
//  1. the control socket (0600, owner and root): everything;
//  2. the web listener, for balancers and monitoring: GET /health and GET /metrics;
//  3. peers, through the tunnel: GET /health, /metrics, /status and /queue. Five things change something: a member's administrator
//     may run configuration commands (POST /command), and look at this queue's messages and give orders about them (POST
//     /queue/order), as root could here; a member may give us items of its queue (PUT /queue/ID); the master, and no other peer, may
//     drain this node and end that; and any member may ask for what is about itself alone (POST /member/…, cluster.ServeMember).
//
// Client is the other side of the first and the third, for the commands.
package web
