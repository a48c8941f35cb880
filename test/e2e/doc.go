// Package e2e tests whole nodes and clusters through what an administrator and a client see: the two programs, SMTP, psql. Each node is
// a real `mailproxy serve` that has become an unprivileged user, with a private PostgreSQL of its own.
//
// The test binary starts itself again in namespaces of its own (see TestMain): network, so that addresses are free and rules that
// drop packets touch nothing else; mounts, for small disks; processes, so that nothing outlives it.
package e2e
