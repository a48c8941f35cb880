// Package lab builds hosts on one machine for whole nodes: each a network namespace with an address on a bridge, in it a real
// `mailproxy serve` with a state directory and a PostgreSQL of its own. It does to them what happens to hosts: cut, slowed down, killed,
// paused, put back to yesterday's database, out of disk, with a wrong clock.
//
// All of it lives in namespaces of its own (sandbox.go): nothing outside sees its addresses, mounts or processes, and when the first of
// its processes is killed the kernel ends the rest. Its walk:
//
//  1. Main, or Hold for the program `lab`, makes the sandbox. Who calls the rest is inside.
//  2. New makes the bridge. This process itself stands on it, at HubAddress: that is where clients send from and next hops listen.
//  3. Add makes a host and its node file; Start its daemon. Form makes hosts one cluster.
//  4. The faults (fault.go) change what is running. Each is undone by its opposite.
//
// What a lab is stands in one file, lab.json, so that another process in the sandbox can go on with it (Open).
package lab
