// Package e2e tests whole nodes and clusters through what an administrator and a client see: the two programs, SMTP, psql. Each node is
// a real `mailproxy serve` that has become an unprivileged user, with a private PostgreSQL of its own.
//
// The nodes are hosts of one lab (test/lab), which is also where the small disks, the cut cables and the sandbox around all come from.
package e2e
