package smtpd

// Pause takes the server out of service without ending it: new sessions are answered 421 4.3.2, those that are open are told so as
// soon as they are between two commands, and a message that is past DATA is taken to its end. Again it does nothing.
func (s *Server) Pause() { s.sessions.pause() }

// Resume takes new sessions again.
func (s *Server) Resume() { s.sessions.paused.Store(false) }

// Cut closes the sessions that are open, without a word; those that were not answered come again. It says how many there were.
func (s *Server) Cut() int {
	n := len(s.sessions.left())
	s.sessions.closeAll()
	return n
}

// pause sets its mark first and wakes the sessions second, as fill wants it.
func (r *registry) pause() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.paused.Store(true)
	for c := range r.conns {
		c.drain()
	}
}
